"""A size in megabytes: the file is no larger, and the type of the weights is the best measured."""

import dataclasses

import pytest
import torch

import hf_lowrank
from hf_lowrank import LowRankConfig, compress
from hf_lowrank.compression import byte_budget
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.torchao_weights import quantized_modules
from hf_lowrank.modeling.stored_size import SizeOnDisk
from hf_lowrank.ranks.plan import RankPlan
from tests.tiny_models import equal_states, logits, snapshot, tiny_gpt2, tiny_llama

pytest.importorskip("torchao.quantization")
# Without prices the whole model is of one type, the best measured.
UNPRICED = {"metric": "whitened"}


def file_size(model, folder):
    model.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("form", ["compact", "factors"])
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_the_size_is_known_before_the_cut(build, weights, form, text, tmp_path):
    model, dense = build(), build()
    config = LowRankConfig(param_ratio=0.6, weights=weights, channels=True, form=form)
    compress(model, config, text[:4], progress=False)
    found = model.config.quantization_config
    shapes = {name: linear_shape(dense.get_submodule(name)) for name in found.ranks}
    narrowed = {name: tuple(shape) for name, shape in (found.narrowed or {}).items()}
    expected = SizeOnDisk(dense)(RankPlan(found.ranks, shapes, narrowed, form), weights)
    tensors = len(model.state_dict())
    assert 0 <= expected - file_size(model, tmp_path) < 70 * tensors


@pytest.mark.parametrize("megabytes", [0.07, 0.05, 0.04, 0.032])
def test_the_file_is_no_larger_and_hardly_smaller(megabytes, text, tmp_path):
    model = tiny_llama()
    config = LowRankConfig(megabytes=megabytes, **UNPRICED)
    report = compress(model, config, text[:4], held_out=text[4:8], progress=False)
    size = file_size(model, tmp_path)
    assert size <= megabytes * 1e6
    chosen = model.config.quantization_config
    assert chosen.megabytes == megabytes
    best = min(report.size_trials, key=lambda trial: trial.loss_difference)
    assert chosen.weights == best.weights
    assert best.bytes >= size
    assert best.param_ratio == pytest.approx(report.parameters.targeted_share)
    assert bool(quantized_modules(model)) == (best.weights is not None)
    assert {trial.weights for trial in report.size_trials} <= {None, "int8", "int4"}
    loaded = hf_lowrank.load(tmp_path)
    assert torch.equal(logits(loaded, text[0]), logits(model, text[0]))


def test_types_of_fewer_bits_are_not_tried_once_one_fits_whole(text):
    model = tiny_llama()
    config = LowRankConfig(megabytes=0.05, **UNPRICED)
    report = compress(model, config, text[:4], held_out=text[4:8], progress=False)
    assert [trial.weights for trial in report.size_trials] == [None, "int8"]
    model = tiny_llama()
    config = config.replace(megabytes=1)
    report = compress(model, config, text[:4], held_out=text[4:8], progress=False)
    assert report.size_trials == []
    assert report.quantization is None
    assert report.parameters.targeted_share == 1


def test_a_given_type_is_taken_without_measuring(text, monkeypatch, tmp_path):
    monkeypatch.setattr(byte_budget.HeldOutLoss, "compare", pytest.fail)
    model = tiny_llama()
    config = LowRankConfig(megabytes=0.032, weights="int4")
    report = compress(model, config, text[:4], progress=False)
    assert report.quantization.weights == "int4"
    assert report.size_trials == []
    assert file_size(model, tmp_path) <= 32_000


def test_the_measured_type_is_the_best(text, monkeypatch):
    """Whatever is measured decides."""
    rises = iter([0.5, 0.3, 0.4])
    difference = hf_lowrank.ranks.tolerance.LossDifference(0.0, 0.0, 1, True)
    fake = lambda *_, **__: dataclasses.replace(difference, mean=next(rises))  # noqa: E731
    monkeypatch.setattr(byte_budget.HeldOutLoss, "compare", fake)
    model = tiny_llama()
    config = LowRankConfig(megabytes=0.036, **UNPRICED)
    report = compress(model, config, text[:4], held_out=text[4:8], progress=False)
    assert [trial.loss_difference for trial in report.size_trials] == [0.5, 0.3, 0.4]
    assert report.quantization.weights == "int8"


def test_the_model_is_dense_while_types_are_tried(text, monkeypatch):
    model = tiny_llama()
    before = snapshot(model)
    trial = byte_budget.SizeTrial
    monkeypatch.setattr(
        byte_budget,
        "SizeTrial",
        lambda *args: equal_states(model.state_dict(), before) and trial(*args),
    )
    config = LowRankConfig(megabytes=0.036, **UNPRICED)
    report = compress(model, config, text[:4], held_out=text[4:8], progress=False)
    assert all(isinstance(each, trial) for each in report.size_trials)


def test_a_size_is_replayed_from_its_decision(text):
    model, again = tiny_llama(), tiny_llama()
    config = LowRankConfig(megabytes=0.036, **UNPRICED)
    compress(model, config, text[:4], held_out=text[4:8], progress=False)
    compress(again, model.config.quantization_config, text[:4], progress=False)
    assert torch.equal(logits(again, text[0]), logits(model, text[0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"megabytes": 0}, r"^megabytes must be a number > 0 \(10\^6 bytes\), got 0"),
        ({"megabytes": "1"}, r"^megabytes must be a number > 0"),
        ({"megabytes": 1, "rank": 3}, "Give one goal, not 2: megabytes and rank are set"),
    ],
)
def test_bad_sizes_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LowRankConfig(**settings)


def test_a_size_that_is_out_of_reach_is_refused_before_any_work(text, monkeypatch):
    monkeypatch.setattr("hf_lowrank.compression.verbs.measure_dense", pytest.fail)
    message = "megabytes=0.02 is too small: with the smallest ranks in int4 the model takes 0.0"
    with pytest.raises(ConfigError, match=message):
        compress(tiny_llama(), LowRankConfig(megabytes=0.02), text[:4], text[4:6])
