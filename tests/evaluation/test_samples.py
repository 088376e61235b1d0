"""Greedy continuations for the report."""

import pytest
import torch

from hf_lowrank.errors import DataError
from hf_lowrank.evaluation.samples import continue_prompts, side_by_side
from hf_lowrank.report.sections import Sample
from tests.scripts import word_tokenizer
from tests.tiny_models import tiny_llama


def test_continuations_are_greedy_and_without_the_prompt():
    model, tokenizer = tiny_llama(), word_tokenizer()
    model.generation_config.update(do_sample=True, temperature=0.3)
    prompts = ["w01 w02", "w05"]
    written = continue_prompts(model, tokenizer, prompts, max_new_tokens=5)
    for prompt, text in zip(prompts, written, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(len(text.split())):
            with torch.no_grad():
                following = model(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, following.view(1, 1)], dim=1)
        assert tokenizer.decode(ids[0]) == f"{prompt} {text}"
        assert 1 <= len(text.split()) <= 5


@pytest.mark.parametrize("end", [None, 2, [2, 1]])
def test_a_tokenizer_without_padding(end: int | list[int] | None):
    model, tokenizer = tiny_llama(), word_tokenizer()
    tokenizer.pad_token = None
    model.generation_config.eos_token_id = end
    assert len(continue_prompts(model, tokenizer, ["w01"], max_new_tokens=2)) == 1


def test_a_prompt_without_tokens():
    with pytest.raises(DataError, match=r"^sample_prompt '' has no tokens"):
        continue_prompts(tiny_llama(), word_tokenizer(), ["w01", ""])


def test_samples_lie_side_by_side():
    assert side_by_side(["p"], ["d"], ["c"]) == [Sample("p", "d", "c")]
