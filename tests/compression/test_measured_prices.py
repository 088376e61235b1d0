"""Prices corrected by what each part of a model does when it is cut alone."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.cli.arguments import CompressionArguments
from hf_lowrank.compression.held_out import HeldOutDivergence
from hf_lowrank.compression.prices import measure_parts, model_parts, scaled_prices
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.report.sections import MeasuredPart
from hf_lowrank.report.text.table import comparison_rows, describe_run, format_report
from tests.compression import mean_loss
from tests.compression.analyzed import analyzed
from tests.measuring.losses import tiny_bert_decoder
from tests.tiny_models import (
    batches_for,
    equal_states,
    logits,
    num_lowrank,
    snapshot,
    tiny_bert_classifier,
    tiny_llama,
    written_batches,
)

CONFIG = LowRankConfig(param_ratio=0.5, channels=True, measured_prices=True)


@pytest.fixture(scope="module")
def text():
    return written_batches(tiny_llama(), num_batches=10)


@pytest.fixture(scope="module")
def analysis(text):
    return analyzed(tiny_llama(), CONFIG, text[:6])


def test_divergence_is_that_of_the_next_token_distributions(text):
    model = tiny_llama()
    divergence = HeldOutDivergence(model, text[:2], windows=6)
    assert sum(len(batch["input_ids"]) for batch in divergence.batches) == 6
    assert divergence.mean() == pytest.approx(0.0, abs=1e-6)
    batches = divergence.batches
    before = [logits(model, batch).log_softmax(-1) for batch in batches]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    total, count = 0.0, 0
    for batch, old in zip(batches, before, strict=True):
        new = logits(model, batch).log_softmax(-1)
        kept = batch["attention_mask"][:, 1:].bool()
        each = F.kl_div(new[:, :-1], old[:, :-1], log_target=True, reduction="none").sum(-1)
        total, count = total + float(each[kept].sum()), count + int(kept.sum())
    assert divergence.mean() == pytest.approx(total / count, rel=1e-4)


def test_parts_are_depths_and_kinds():
    model = tiny_llama(num_hidden_layers=20)
    names = [n for n, m in model.named_modules() if n.endswith("_proj")]
    parts = model_parts(model, names)
    assert len(parts) == 20
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert {name.split(".")[2] for name in parts[0]} == {"0", "1"}
    kinds = [{name.split(".")[3] for name in part} for part in parts]
    assert all(len(kind) == 1 for kind in kinds)
    assert len(model_parts(tiny_llama(), ["model.layers.1.mlp.up_proj"])) == 1


def test_factors_are_measured_over_predicted_and_the_model_is_dense_again(text, analysis):
    model = tiny_llama()
    before = snapshot(model)
    plan = analysis.plan_for_ratio(0.5)
    found = measure_parts(model, analysis, plan, text[6:], progress=False)
    assert equal_states(snapshot(model), before)
    assert num_lowrank(model) == 0
    cut = {n for n, rank in plan.ranks.items() if rank is not None} | set(plan.narrowed)
    assert cut <= {name for part in found for name in part.layers}
    for part in found:
        assert part.factor == pytest.approx(part.measured / part.predicted)
    corrected = scaled_prices(analysis, found)
    total = sum(part.measured for part in found)
    assert corrected.predicted_rise(plan) == pytest.approx(total)
    assert corrected.spectra.keys() == analysis.spectra.keys()


def test_a_part_that_costs_more_than_predicted_keeps_more(text, analysis):
    plan = analysis.plan_for_ratio(0.5)
    parts = model_parts(tiny_llama(), plan.ranks)

    def kept(found_plan, layers):
        sizes = {**found_plan.shapes, **found_plan.narrowed}
        return sum(
            sizes[n][0] * sizes[n][1]
            if (rank := found_plan.ranks[n]) is None
            else rank * sum(sizes[n])
            for n in layers
        )

    gains = []
    for layers in parts:
        factors = [MeasuredPart(tuple(layers), 1.0, 5.0, 5.0)]
        corrected = scaled_prices(analysis, factors).plan_for_ratio(0.5)
        gains.append(kept(corrected, layers) - kept(plan, layers))
        assert corrected.kept_parameters <= 0.5 * plan.dense_parameters
    assert min(gains) >= 0  # 0 where the part was whole before
    assert max(gains) > 0


def test_a_run_reports_what_corrected_its_prices(text):
    model, held_out = tiny_llama(), text[6:]
    report = compress(model, CONFIG, text[:6], text[8:], held_out=held_out, progress=False)
    assert report.measured_prices
    total = sum(part.measured for part in report.measured_prices)
    assert report.predicted_loss_difference == pytest.approx(total, rel=0.5)
    assert report.seconds["prices"] > 0
    assert "parts corrected by measurement: factors" in format_report(report)
    assert "prices measured part by part" in describe_run(report)
    assert comparison_rows({"a": report})[1][8] == "kfac, channels, measured_prices"
    again = tiny_llama()
    compress(again, model.config.quantization_config, text[:6], progress=False)  # a replay
    assert equal_states(snapshot(again), snapshot(model))


def test_a_log_file_hears_of_the_parts(text, analysis, capsys):
    model, plan = tiny_llama(), analysis.plan_for_ratio(0.5)
    measure_parts(model, analysis, plan, text[6:], progress=False)
    assert capsys.readouterr().err == ""
    measure_parts(model, analysis, plan, text[6:])
    number = len(model_parts(model, plan.ranks))
    assert capsys.readouterr().err == f"... measure prices: 0 of {number} parts, 0%\n"


def test_a_tolerance_is_searched_with_corrected_prices(text):
    model, dense = tiny_llama(), tiny_llama()
    config = LowRankConfig(loss_tolerance=0.1, measured_prices=True)
    report = compress(model, config, text[:6], held_out=text[6:], progress=False)
    assert report.measured_prices
    assert mean_loss(model, text[6:]) - mean_loss(dense, text[6:]) <= 0.1
    assert num_lowrank(model)


def test_held_out_text_is_taken_from_the_calibration_text_or_asked_for(text):
    report = compress(tiny_llama(), CONFIG, text[:8], progress=False)
    assert report.data.calibration_tokens == sum(b["input_ids"].numel() for b in text[:6])
    with pytest.raises(DataError, match="prices are corrected"):
        compress(tiny_llama(), CONFIG, text[:1], progress=False)
    roles = CompressionArguments(param_ratio=[0.5], measured_prices=True).text_roles()
    assert roles["held_out"] == 32


def test_other_models_and_rules_are_refused(text):
    model = tiny_bert_classifier()
    with pytest.raises(ConfigError, match="BertForSequenceClassification is no causal language"):
        compress(model, CONFIG, batches_for(model, 4), progress=False)
    assert num_lowrank(model) == 0
    with pytest.raises(ConfigError, match="measured_prices works on prices"):
        LowRankConfig(param_ratio=0.5, metric="whitened", measured_prices=True)


def no_work(*args, **kwargs):
    pytest.fail("worked")


def test_a_model_with_more_than_a_head_is_refused_before_any_work(text, monkeypatch):
    monkeypatch.setattr("hf_lowrank.compression.application.analyze", no_work)
    with pytest.raises(ConfigError, match=r"^BertLMHeadModel: .* recover_steps and measured_pri"):
        compress(tiny_bert_decoder(), CONFIG, text[:4], progress=False)


def test_prices_without_held_out_text_are_refused_before_any_work(text, monkeypatch):
    monkeypatch.setattr("hf_lowrank.compression.application.analyze", no_work)
    with pytest.raises(DataError, match=r"measured_prices needs held-out text; pass held_out\."):
        compress(tiny_llama(), CONFIG, text[:4], held_out=[], progress=False)


def test_factors_stay_within_bounds(text, analysis):
    tiny = {n: dataclasses.replace(s, price=s.price * 1e-6) for n, s in analysis.spectra.items()}
    low = dataclasses.replace(analysis, spectra=tiny, orders={})
    plan = low.plan_for_ratio(0.5)
    found = measure_parts(tiny_llama(), low, plan, text[6:], progress=False)
    assert {part.factor for part in found} == {20.0}
