"""What the report of a run says, and that its figures are true."""

import json

import pytest
import torch

from hf_lowrank import LowRankConfig, LowRankLinear, compress
from hf_lowrank.report.sections import Data, Sizes
from tests.compression import mean_loss
from tests.tiny_models import equal_states, snapshot, tiny_llama, written_batches


def test_report_tells_what_was_done(text):
    model, dense = tiny_llama(), tiny_llama()
    config = LowRankConfig(param_ratio=0.6, seed=3)
    report = compress(model, config, text[:6], text[6:8], progress=False)
    assert report.config.param_ratio == 0.6
    assert "ranks" not in report.config.others
    assert report.seed == 3
    assert report.parameters.dense == sum(p.numel() for p in dense.parameters())
    assert report.parameters.kept == sum(p.numel() for p in model.parameters())
    assert report.bytes == Sizes(4 * report.parameters.dense, 4 * report.parameters.kept)
    saved = report.parameters.targeted_dense - report.parameters.targeted_kept
    assert report.parameters.dense - report.parameters.kept == saved > 0
    assert report.data == Data(calibration_tokens=6 * 4 * 16)
    assert set(report.seconds) >= {"statistics", "decomposition", "ranks", "surgery", "evaluation"}
    assert (report.failures, report.untouched, report.probes) == ({}, {}, [])
    assert report.held_out is None
    assert report.versions["torch"] == torch.__version__


def test_evaluation_agrees_with_an_independent_loss(text):
    model, dense = tiny_llama(), tiny_llama()
    report = compress(model, LowRankConfig(param_ratio=0.6), text[:6], text[6:8], progress=False)
    before, after = mean_loss(dense, text[6:8]), mean_loss(model, text[6:8])
    found = report.evaluation
    assert found.loss_before == pytest.approx(before, rel=1e-5)
    assert found.loss_after == pytest.approx(after, rel=1e-5)
    assert found.loss_difference == pytest.approx(after - before, abs=1e-5)
    assert found.perplexity_after == pytest.approx(float(torch.tensor(after).exp()), rel=1e-4)
    assert found.tokens == 2 * 4 * 15


def test_report_is_json(text, tmp_path):
    report = compress(tiny_llama(), LowRankConfig(param_ratio=0.6), text[:2], progress=False)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()


def test_decision_is_in_the_config_that_is_saved(text):
    model = tiny_llama()
    report = compress(model, LowRankConfig(param_ratio=0.6), text[:4], progress=False)
    assert model.config.quantization_config.ranks == report.ranks
    assert model.config.to_dict()["quantization_config"]["ranks"] == report.ranks


def test_the_same_run_gives_the_same_model(text):
    models = [tiny_llama(), tiny_llama()]
    for model in models:
        compress(model, LowRankConfig(param_ratio=0.5), text[:4], progress=False)
    assert equal_states(snapshot(models[0]), snapshot(models[1]))


# Negative controls


def randomize_factors_(model):
    """Random input directions in place of the chosen ones; the best use is made of them."""
    generator = torch.Generator().manual_seed(0)
    dense = tiny_llama()
    for name, layer in model.named_modules():
        if isinstance(layer, LowRankLinear):
            shape = layer.in_features, layer.rank
            basis = torch.linalg.qr(torch.randn(shape, generator=generator)).Q
            with torch.no_grad():
                layer.lowrank_A.weight.copy_(basis.T)
                layer.lowrank_B.weight.copy_(dense.get_submodule(name).weight @ basis)


@pytest.mark.parametrize("metric", ["kfac", "whitened", "plain"])
def test_random_factors_of_the_same_ranks_are_worse(text, metric):
    model = tiny_llama()
    config = LowRankConfig(param_ratio=0.8, metric=metric)
    report = compress(model, config, text[:8], text[8:], progress=False)
    randomize_factors_(model)
    control = mean_loss(model, text[8:]) - report.evaluation.loss_before
    assert control > report.evaluation.loss_difference + 0.2


def test_prediction_is_near_the_measured_rise(text):
    many = written_batches(tiny_llama(), num_batches=40, seed=1)
    config = LowRankConfig(param_ratio=0.9)
    report = compress(tiny_llama(), config, many, text, progress=False)
    measured = report.evaluation.loss_difference
    assert measured > 0.01
    assert 0.5 < report.predicted_loss_difference / measured < 2


def test_a_metric_without_prices_predicts_nothing():
    config = LowRankConfig(param_ratio=0.6, metric="plain")
    assert compress(tiny_llama(), config, progress=False).predicted_loss_difference is None
