"""The joint system: its guarantees, what it refuses, and its command."""

import json
import math

import pytest
import torch

import hf_lowrank
from benchmarks.cost import counted
from hf_lowrank import LowRankConfig, compress
from hf_lowrank.compression.gradients import collect_gradients
from hf_lowrank.compression.held_out import HeldOutLoss
from hf_lowrank.compression.joint.candidates import JointSettings
from hf_lowrank.compression.joint.system import compress_jointly
from hf_lowrank.errors import ConfigError, DataError, NumericalError
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.measuring.losses import item_losses
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.report.page.page import report_page
from hf_lowrank.report.text.table import format_report
from tests.compression.analyzed import analyzed
from tests.scripts import InProcess, make_inputs
from tests.tiny_models import (
    equal_states,
    num_lowrank,
    sentence_batches,
    tiny_bert_classifier,
    tiny_llama,
)


def test_a_given_size_is_kept_and_never_worse_than_price_alone(text):
    model = tiny_llama()
    report = compress_jointly(
        model, LowRankConfig(param_ratio=0.6), text[:6], text[6:9], text[9:], progress=False
    )
    joint = report.joint
    assert report.parameters.targeted_kept <= 0.6 * report.parameters.targeted_dense
    assert report.held_out.mean <= joint.baseline.mean
    measured = [trial.mean for trial in joint.trials if trial.complete]
    assert report.held_out.mean == min(measured)
    assert joint.trials[0].name == "price"
    assert len(joint.trials) >= 3
    dense = measure_loss(tiny_llama(), text[6:9]).mean
    rise = measure_loss(model, text[6:9]).mean - dense
    assert rise == pytest.approx(report.held_out.mean, abs=1e-5)
    reported = measure_loss(model, text[9:]).mean - measure_loss(tiny_llama(), text[9:]).mean
    assert report.evaluation.loss_difference == pytest.approx(reported, abs=1e-5)
    assert model.config.quantization_config.ranks == report.ranks
    assert report.to_dict()["joint"]["method"] == joint.method
    assert f"joint: accepted {joint.method!r} at" in format_report(report)


def test_nothing_tried_is_price_alone(text):
    config = LowRankConfig(param_ratio=0.6)
    report = compress_jointly(
        tiny_llama(), config, text[:4], text[4:6], settings=JointSettings((), ()), progress=False
    )
    assert report.joint.method == "price"
    assert report.held_out.mean == report.joint.baseline.mean
    assert len(report.joint.trials) == 1


def test_a_report_of_corrected_factors_shows_the_spectra_of_the_dense_weights(text, monkeypatch):
    """Corrected factors have as many components as their rank, and no prices."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(
        "hf_lowrank.compression.joint.candidates._is_better", lambda candidate, best: True
    )
    config, settings = LowRankConfig(param_ratio=0.6), JointSettings((), (1e-2,))
    report = compress_jointly(
        tiny_llama(), config, text[:4], text[4:6], settings=settings, progress=False
    )
    assert report.joint.method == "price, step 0.01"
    plain = compress(tiny_llama(), config, text[:4], progress=False)
    assert report.spectra == plain.spectra
    assert report.predicted_loss_difference == plain.predicted_loss_difference
    assert "Spectra and where they are cut" in report_page(report)


def test_candidates_without_a_finite_loss_are_refused(text, monkeypatch):
    measure, calls = HeldOutLoss.difference, []

    def fail_later(self, *args):
        calls.append(args)
        if len(calls) > 1:
            raise NumericalError("NaN")
        return measure(self, *args)

    monkeypatch.setattr(HeldOutLoss, "difference", fail_later)
    config = LowRankConfig(param_ratio=0.6)
    report = compress_jointly(tiny_llama(), config, text[:4], text[4:6], progress=False)
    assert report.joint.method == "price"
    assert len(calls) >= 3


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_a_tolerance_is_kept_by_a_model_no_larger_than_price_alone(text, tolerance):
    model = tiny_llama()
    config = LowRankConfig(loss_tolerance=tolerance)
    report = compress_jointly(model, config, text[:6], text[6:9], text[9:], progress=False)
    parameters = report.parameters
    assert report.held_out.mean <= tolerance
    assert parameters.targeted_kept / parameters.targeted_dense <= report.joint.baseline_ratio
    rise = measure_loss(model, text[6:9]).mean - measure_loss(tiny_llama(), text[6:9]).mean
    assert rise <= tolerance + 1e-5


def test_ranks_fixed_by_hand_stay(text):
    config = LowRankConfig(param_ratio=0.7, rank_pattern={"layers.0.self_attn.q_proj": 3})
    report = compress_jointly(tiny_llama(), config, text[:4], text[4:6], progress=False)
    assert report.ranks["model.layers.0.self_attn.q_proj"] == 3


def test_an_encoder():
    batches = sentence_batches(6)
    model = tiny_bert_classifier()
    report = compress_jointly(
        model,
        LowRankConfig(param_ratio=0.5),
        batches[:2],
        batches[2:4],
        batches[4:],
        progress=False,
    )
    assert report.held_out.mean <= report.joint.baseline.mean
    assert num_lowrank(model) > 0


@pytest.mark.parametrize(
    ("label_source", "loss", "passes"),
    [("data", None, 1), ("model", None, 2), ("model", item_losses, 1)],
)
def test_gradients_take_a_pass_of_their_own_only_where_labels_are_drawn(
    text, label_source, loss, passes
):
    model = tiny_llama()
    config = LowRankConfig(param_ratio=0.6, label_source=label_source)
    with counted(model) as cost:
        compress_jointly(model, config, text[:4], text[4:6], loss_function=loss, progress=False)
    dry = len(text[0]["input_ids"])  # the first batch, to see which layers qualify
    assert cost.backwards == dry + passes * sum(len(batch["input_ids"]) for batch in text[:4])


@pytest.mark.parametrize("moment_gib", [8.0, 1e-5])
def test_what_is_read_in_passing_is_what_a_pass_of_its_own_gives(text, moment_gib):
    model, config = tiny_llama(), LowRankConfig()
    found = analyzed(model, config, text[:4], with_gradients=True, moment_gib=moment_gib)
    alone = analyzed(model, config, text[:4], moment_gib=moment_gib)
    own = collect_gradients(model, find_targets(model, config), text[:4], config)
    assert set(found.spectra) == set(found.gradients.forms) == set(own.mean)
    for name, gradient in own.mean.items():
        assert torch.allclose(found.gradients.mean[name], gradient, atol=1e-7)
        assert gradient.abs().max() > 1e-4
        assert torch.equal(found.spectra[name].sigma, alone.spectra[name].sigma)


def test_a_cache_of_spectra_does_not_keep_the_gradients_away(text, tmp_path):
    config = LowRankConfig(param_ratio=0.6)
    compress(tiny_llama(), config, text[:4], cache_dir=tmp_path, progress=False)
    states = []
    for options in ({}, {"cache_dir": tmp_path}, {"cache_dir": tmp_path}):
        model = tiny_llama()
        compress_jointly(model, config, text[:4], text[4:6], progress=False, **options)
        states.append(model.state_dict())
    assert all(equal_states(states[0], state) for state in states[1:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "plain", "param_ratio": 0.5}, "rule 'price', got 'plain' and None; set these"),
        ({"rule": "energy", "param_ratio": 0.5}, "rule 'price', got 'kfac' and 'energy'; set"),
        ({"rank": 3}, "set param_ratio or loss_tolerance"),
    ],
)
def test_other_goals_are_refused(text, settings, message):
    with pytest.raises(ConfigError, match=message):
        compress_jointly(tiny_llama(), LowRankConfig(**settings), text[:1], text[1:2])


def test_an_empty_set_is_refused(text):
    with pytest.raises(DataError, match=r"for acceptance, got 1 and 0; pass gradient and"):
        compress_jointly(tiny_llama(), LowRankConfig(param_ratio=0.5), text[:1], [])


# The command


@pytest.mark.parametrize("goal", [{"param_ratio": 0.6}, {"loss_tolerance": 0}])
def test_the_command_saves_what_it_measured(tmp_path, monkeypatch, capsys, goal):
    inputs = make_inputs(tmp_path)
    run = InProcess("compress_llm", monkeypatch, capsys)
    output = tmp_path / "output"
    finished = run(*inputs.arguments(output_dir=output, **goal), "--joint")
    assert finished.code == 0, finished.err
    report = json.loads((output / "report.json").read_text())
    assert report["held_out"]["mean"] <= goal.get("loss_tolerance", math.inf)
    model = hf_lowrank.load(output)
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == (report["parameters"]["kept"])
    )


def test_the_command_takes_one_size(tmp_path, monkeypatch, capsys):
    inputs = make_inputs(tmp_path)
    run = InProcess("compress_llm", monkeypatch, capsys)
    error = run(*inputs.arguments(), "--param_ratio", "0.6", "0.5", "--joint").error
    assert error == "joint works on one param_ratio at a time."
