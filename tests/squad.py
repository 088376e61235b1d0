"""Made-up questions in SQuAD's format: the answer is always "w91 w92", somewhere in the context."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.scripts import WORDS, word_tokenizer
from tests.tiny_models import HIDDEN, INTERMEDIATE, MAX_LENGTH, SCALE, VOCABULARY, build

ANSWER = ("w91", "w92")


def article(number: int, questions: int = 4, words: int = 40) -> dict[str, Any]:
    """An article with two questions on each paragraph."""
    generator = torch.Generator().manual_seed(number)
    paragraphs = []
    for first in range(0, questions, 2):
        # The last words are left out, so that the answer stands in the context once.
        drawn = torch.randint(len(WORDS) - 4, (words,), generator=generator).tolist()
        at = int(torch.randint(words, (1,), generator=generator))
        parts = [WORDS[i] for i in drawn]
        context = " ".join([*parts[:at], *ANSWER, *parts[at:]])
        answer = {"text": " ".join(ANSWER), "answer_start": context.index(ANSWER[0])}
        paragraphs.append(
            {
                "context": context,
                "qas": [
                    {
                        "id": f"{number}-{i}",
                        "question": " ".join(WORDS[number + i : number + i + 3]) + " ?",
                        "answers": [answer, {**answer, "text": ANSWER[0]}],
                    }
                    for i in range(first, min(first + 2, questions))
                ],
            }
        )
    return {"title": f"title {number}", "paragraphs": paragraphs}


def write_squad(path: Path, articles: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    return path


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """The word tokenizer with BERT's frame around a question and its context."""
    words = word_tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        pad_token=words.pad_token,
        unk_token=words.unk_token,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def save_encoder(folder: Path) -> Path:
    """A tiny encoder without a head, and its tokenizer."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=MAX_LENGTH,
        initializer_range=SCALE, pad_token_id=0,
    )  # fmt: skip
    build(BertModel, config, 0).save_pretrained(folder)
    pair_tokenizer().save_pretrained(folder)
    return folder
