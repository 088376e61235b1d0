"""Calibration text that the model writes itself."""

from pathlib import Path

import pytest
import torch

from hf_lowrank.cli.arguments import CompressionArguments
from hf_lowrank.errors import DataError, NumericalError
from hf_lowrank.inputs.own_text import OwnText
from hf_lowrank.inputs.text import token_batches
from tests.tiny_models import logits, tiny_bert_classifier, tiny_gpt2, tiny_llama


class Words:
    """A tokenizer of the tiny models' ids that puts `start` before a text."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __init__(self, start=()):
        self.start = list(start)

    def __call__(self, text, add_special_tokens=True, **kwargs):
        ids = [3 + ord(letter) % 90 for letter in text]
        return {"input_ids": (self.start if add_special_tokens else []) + ids}


def batches(own, source="generated", **changes):
    settings = {"sequences": 20, "sequence_length": 12, "batch_size": 8} | changes
    return token_batches(source, own.tokenizer, own_text=own, **settings)


def ids_of(found):
    return torch.cat([batch["input_ids"] for batch in found])


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_model_takes_its_own_text_for_likelier_than_random_tokens(build):
    model = build()
    ids = ids_of(batches(OwnText(model, Words())))
    assert ids.shape == (20, 12)
    other = torch.randint(3, 96, ids.shape, generator=torch.Generator().manual_seed(0))

    def loss(tokens):
        found = logits(model, {"input_ids": tokens})[:, :-1].log_softmax(-1)
        return -float(found.gather(-1, tokens[:, 1:, None]).mean())

    assert loss(ids) < loss(other) - 0.5
    assert not (ids == 2).any()  # no window ends early


def test_it_is_sampled_apart_for_each_role_and_repeatable():
    own, state = OwnText(tiny_llama(), Words()), torch.get_rng_state()
    first, again = ids_of(batches(own)), ids_of(batches(own))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    held_out = ids_of(batches(own, role="held_out"))
    assert not {tuple(row) for row in first.tolist()} & {tuple(row) for row in held_out.tolist()}
    other = ids_of(batches(OwnText(own.model, own.tokenizer, seed=1)))
    assert not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 20


def test_the_settings_of_the_checkpoint_cut_nothing_off():
    model = tiny_llama()
    expected = ids_of(batches(OwnText(model, Words())))
    model.generation_config.update(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0
    )
    assert torch.equal(ids_of(batches(OwnText(model, Words()))), expected)


def test_windows_begin_with_the_start_token():
    ids = ids_of(batches(OwnText(tiny_llama(), Words(start=[1]))))
    assert ids.shape == (20, 12)
    assert set(ids[:, 0].tolist()) == {1}


def test_it_may_be_a_part_of_a_mixture(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("some words of a file " * 50, encoding="utf-8")
    own = OwnText(tiny_llama(), Words())
    mixed = ids_of(batches(own, f"{path} + generated:0.25"))
    alone = {tuple(row) for row in ids_of(batches(own, sequences=5)).tolist()}
    assert sum(tuple(row) in alone for row in mixed.tolist()) == 5
    assert len(mixed) == 20


def test_it_is_kept_for_the_next_run_of_the_same_model(tmp_path: Path, monkeypatch):
    own = OwnText(tiny_llama(), Words(), folder=tmp_path)
    expected = ids_of(batches(own))
    (path,) = tmp_path.iterdir()

    def no_work(*args, **kwargs):
        pytest.fail("written again")

    monkeypatch.setattr(OwnText, "_write", no_work)
    assert torch.equal(ids_of(batches(own)), expected)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:-9])
    assert torch.equal(ids_of(batches(own)), expected)
    other = OwnText(tiny_llama(seed=1), Words(), folder=tmp_path)
    assert not torch.equal(ids_of(batches(other)), expected)


def test_what_can_write_nothing_is_refused():
    with pytest.raises(DataError, match=r"^BertForSequenceClassification writes no text; give a"):
        batches(OwnText(tiny_bert_classifier(), Words()))
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="own predictions are no probabilities"):
        batches(OwnText(model, Words()))


def test_the_model_is_not_judged_on_it():
    own = OwnText(tiny_llama(), Words())
    with pytest.raises(DataError, match=r"'generated' is calibration text .* no evaluation text"):
        batches(own, role="evaluation")
    with pytest.raises(DataError, match="no calibration text here"):
        token_batches("generated", Words(), sequences=2, sequence_length=8)
    for settings in (
        {"evaluation": "generated"},
        {"foreign_evaluation": "demo + generated:0.5", "evaluation": "demo"},
    ):
        with pytest.raises(DataError, match="would flatter the model"):
            CompressionArguments(param_ratio=[0.5], model="x", **settings).to_config()
    CompressionArguments(param_ratio=[0.5], calibration="generated").to_config()


def test_a_tokenizer_without_special_tokens_begins_with_any():
    words = Words()
    words.bos_token_id = words.eos_token_id = words.pad_token_id = None
    assert ids_of(batches(OwnText(tiny_llama(), words))).shape == (20, 12)
