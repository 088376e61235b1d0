"""The start token, as the tokenizer itself tells it."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_lowrank.inputs.start_token import encode_prompt, start_text, start_tokens

SPECIAL = {"<s>": 0, "</s>": 1, "[CLS]": 2, "[SEP]": 3, "[gMASK]": 4, "<sop>": 5, "[UNK]": 6}


def tokenizer_with(template: str, **names: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words that puts a text into a template."""
    words = {word: i + len(SPECIAL) for i, word in enumerate(("a", "list", "is"))}
    built = Tokenizer(models.WordLevel(SPECIAL | words, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    if template != "$A":
        built.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list(SPECIAL.items())
        )
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="[UNK]", **names)


CASES = {
    "gpt2, smollm2: none is added": ("$A", {"bos_token": "<s>"}, None),
    "llama, gemma": ("<s> $A", {"bos_token": "<s>"}, "<s>"),
    "llama that ends texts": ("<s> $A </s>", {"bos_token": "<s>", "eos_token": "</s>"}, "<s>"),
    "opt: one token begins and ends": ("</s> $A", {"bos_token": "</s>"}, "</s>"),
    "roberta: cls is its bos": ("<s> $A </s>", {"bos_token": "<s>", "cls_token": "<s>"}, "<s>"),
    "glm": ("[gMASK] <sop> $A", {}, "[gMASK]<sop>"),
    "bert": ("[CLS] $A [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]"}, None),
    "t5": ("$A </s>", {"eos_token": "</s>"}, None),
    "xlnet": ("$A [SEP] [CLS]", {"bos_token": "<s>"}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_start_is_what_is_put_before_a_text(name: str):
    template, names, expected = CASES[name]
    tokenizer = tokenizer_with(template, **names)
    assert start_text(tokenizer) == expected
    known = [] if expected is None else expected.replace("<", " <").split()
    assert start_tokens(tokenizer) == [SPECIAL[token] for token in known]


def test_a_prompt_begins_with_the_start_and_has_no_end():
    tokenizer = tokenizer_with("<s> $A </s>", bos_token="<s>", eos_token="</s>")
    assert tokenizer("a list")["input_ids"] == [0, 7, 8, 1]
    assert encode_prompt(tokenizer, "a list").tolist() == [[0, 7, 8]]


def test_a_prompt_without_tokens_stays_empty():
    found = encode_prompt(tokenizer_with("<s> $A", bos_token="<s>"), " ")
    assert found.shape == (1, 0)
    assert found.dtype == torch.long
