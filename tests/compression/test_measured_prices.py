"""Prices of cuts on held-out text."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.channels.expert_order import ExpertOrder
from hf_lowrank.cli.arguments import CompressionArguments
from hf_lowrank.compression.analysis import analyze
from hf_lowrank.compression.decision import decide
from hf_lowrank.compression.prices import (
    HeldOutPrices,
    channel_cut,
    enough,
    measure_prices,
    model_parts,
    rank_cut,
    standard_error,
)
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.measuring.effects import Effects
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.report.text.table import comparison_rows, describe_run, format_report
from tests.compression import mean_loss
from tests.compression.analyzed import analyzed, quiet_run
from tests.tiny_models import (
    equal_states,
    logits,
    num_lowrank,
    sentence_batches,
    snapshot,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    token_batches,
    written_batches,
)

CONFIG = LowRankConfig(param_ratio=0.5, channels=True, measured_prices=True)


@pytest.fixture(scope="module")
def text():
    return written_batches(tiny_llama(), num_batches=10)


@pytest.fixture(scope="module")
def analysis(text):
    return analyzed(tiny_llama(), CONFIG, text[:6], held_out=text[6:])


def priced(analysis, ratio=0.5):
    plan = analysis.plan_for_ratio(ratio)
    return plan, *analysis.priced(plan, model_parts(tiny_llama(), plan.ranks))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_cuts_are_those_that_surgery_makes(build):
    model = build()
    found = analyzed(model, CONFIG.replace(measured_prices=False), written_batches(model, 6))
    for name, factors in found.factors.items():
        cut = rank_cut(name, factors)
        assert torch.equal(cut.left[:, :5] @ cut.right[:5], factors.left[:, :5] @ factors.right[:5])
        assert list(cut.counts) == list(range(len(factors.right) + 1))
    assert found.orders
    for name, order in found.orders.items():
        cut, count = channel_cut(model, order), order.counts[5]
        narrowing = order.narrowing(model, count)
        kept = narrowing.gather[0]
        expected = torch.zeros(cut.left.shape[0], cut.right.shape[1], dtype=torch.float64)
        expected[:, kept] = narrowing.output.double()
        product = (cut.left[:, :count] @ cut.right[:count]).double()
        assert torch.allclose(product, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        assert list(cut.counts) == order.counts
        assert cut.layer == name


def test_a_singular_moment_has_no_cut(analysis):
    order = next(iter(analysis.orders.values()))
    flat = dataclasses.replace(order, moment=torch.zeros_like(order.moment))
    assert channel_cut(tiny_llama(), flat) is None


def test_the_sum_over_the_parts_is_what_is_predicted(text, analysis):
    plan, found, parts = priced(analysis)
    assert parts
    assert found.predicted_rise(plan) == pytest.approx(sum(p.measured for p in parts), rel=0.05)
    for part in parts:
        assert part.factor == pytest.approx(part.measured / part.predicted)
    cut = {n for n, rank in plan.ranks.items() if rank is not None} | set(plan.narrowed)
    assert cut <= {name for part in parts for name in part.layers}
    assert found.spectra.keys() == analysis.spectra.keys()
    assert all(bool((s.price >= 0).all()) for s in found.spectra.values())
    changed = [
        not torch.equal(found.spectra[n].price, s.price) for n, s in analysis.spectra.items()
    ]
    assert all(changed)


def test_a_prediction_of_text_that_was_not_seen_is_nearer_than_that_of_the_calibration_text():
    """From few tokens, a decomposition drops what these do not need."""
    off, off_before = [], []
    for seed in range(3):
        model = tiny_llama(seed)
        text = written_batches(model, num_batches=60, seed=seed)
        found = analyzed(model, CONFIG.replace(channels=False), text[:2], held_out=text[2:30])
        plan = found.plan_for_ratio(0.9)
        predicted = found.priced(plan, model_parts(model, plan.ranks))[0].predicted_rise(plan)
        before = [logits(model, each)[:, :-1].log_softmax(-1) for each in text[30:]]
        config = found.config.replace(measured_prices=False, ranks=dict(plan.ranks))
        compress(model, config, text[:2], progress=False)
        after = [logits(model, each)[:, :-1].log_softmax(-1) for each in text[30:]]
        divergence = F.kl_div(
            torch.cat(after), torch.cat(before), log_target=True, reduction="none"
        )
        measured = float(divergence.sum(-1).mean())
        off.append(abs(math.log(predicted / measured)))
        off_before.append(abs(math.log(found.predicted_rise(plan) / measured)))
    assert sum(off) < 0.6 * sum(off_before), (off, off_before)


def test_a_layer_that_costs_more_than_predicted_keeps_more(analysis):
    assert analysis.held_out is not None
    usual = dataclasses.replace(analysis, config=CONFIG.replace(channels=False))
    ranks = priced(usual)[1].plan_for_ratio(0.5).ranks
    name = min((n for n, rank in ranks.items() if rank), key=lambda n: ranks[n])
    effects = dict(analysis.held_out.ranks)
    effects[name] = Effects(100 * effects[name].items, 10_000 * effects[name].squares)
    dear = dataclasses.replace(
        analysis,
        held_out=dataclasses.replace(analysis.held_out, ranks=effects),
        config=CONFIG.replace(channels=False),
    )
    rank = priced(dear)[1].plan_for_ratio(0.5).ranks[name]
    assert rank is None or rank > ranks[name]


def test_what_positions_have_in_common_counts(analysis):
    """Twice the change of an item at the same squares by position: four times the price."""
    both = {}
    for scale in (1.0, 2.0):
        assert analysis.held_out is not None
        ranks, channels = (
            {n: Effects(scale * each.items, each.squares) for n, each in found.items()}
            for found in (analysis.held_out.ranks, analysis.held_out.channels)
        )
        held_out = dataclasses.replace(analysis.held_out, ranks=ranks, channels=channels)
        plan, found, _ = priced(dataclasses.replace(analysis, held_out=held_out))
        both[scale] = found.predicted_rise(plan)
    assert both[2.0] == pytest.approx(4 * both[1.0], rel=1e-6)


def test_the_standard_error_is_that_of_the_mean_over_items():
    items = torch.zeros(6, 3)
    squares = torch.tensor([[1.0, 0.5, 0.0]]).repeat(6, 1)
    squares[:, 1] = torch.tensor([1.0, 2.0, 6.0, 3.0, 2.0, 4.0])  # two draws of three items
    found = HeldOutPrices({"a": Effects(items, squares)}, {}, scored=60, draws=2)
    plan = RankPlan({"a": 1}, {"a": (4, 4)})
    rises = torch.tensor([2.0, 2.0, 5.0]) / (2 * 10)  # each item has 10 positions
    expected = float(rises.std()) / 3**0.5
    assert standard_error(found, {"a": 1.0}, {}, plan) == pytest.approx(expected)
    assert standard_error(found, {"a": 3.0}, {}, plan) == pytest.approx(3 * expected)
    assert standard_error(found, {"a": 1.0}, {}, RankPlan({"a": None}, {"a": (4, 4)})) == 0.0


def test_no_more_text_is_read_than_is_enough():
    long, short = token_batches(4, 2, length=1024), token_batches(1000, 4, length=16)
    assert len(enough(long)) == 4  # 8 items
    assert sum(each["input_ids"].numel() for each in enough(short)) == 3072
    assert len(enough(short[:3])) == 3


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


def test_a_run_reports_what_its_prices_are(text):
    model, held_out = tiny_llama(), text[6:]
    config = CONFIG.replace(param_ratio=0.8)
    report = compress(model, config, text[:6], text[8:], held_out=held_out, progress=False)
    assert report.measured_prices
    assert report.predicted_standard_error > 0
    said = format_report(report)
    assert f"+- {report.predicted_standard_error:.4f}" in said
    assert "parts on held-out text over those on calibration text:" in said
    assert report.seconds["prices"] > 0
    assert "prices from held-out text" in describe_run(report)
    assert comparison_rows({"a": report})[1][8] == "kfac, channels, measured_prices"
    again = tiny_llama()
    compress(again, model.config.quantization_config, text[:6], progress=False)  # a replay
    assert equal_states(snapshot(again), snapshot(model))


def test_without_measured_prices_no_error_is_claimed(text):
    config = CONFIG.replace(measured_prices=False)
    report = compress(tiny_llama(), config, text[:6], text[8:], progress=False)
    assert report.predicted_loss_difference > 0
    assert report.predicted_standard_error is None
    assert "+-" not in format_report(report).split("predicted by the prices:")[1].split("\n")[0]


def test_a_log_file_hears_of_the_measurement(text, analysis, capsys):
    model = tiny_llama()
    arguments = (model, analysis.factors, analysis.orders, text[6:8])
    measure_prices(*arguments, progress=False)
    assert capsys.readouterr().err == ""
    measure_prices(*arguments)
    assert capsys.readouterr().err == "... measure prices: 0 of 4 batches, 0%\n"


def test_a_tolerance_is_searched_with_these_prices(text):
    model, dense = tiny_llama(), tiny_llama()
    config = LowRankConfig(loss_tolerance=0.1, measured_prices=True)
    report = compress(model, config, text[:6], held_out=text[6:], progress=False)
    assert report.measured_prices
    assert mean_loss(model, text[6:]) - mean_loss(dense, text[6:]) <= 0.1
    assert num_lowrank(model)


def test_held_out_text_is_taken_from_the_calibration_text_or_asked_for(text):
    report = compress(tiny_llama(), CONFIG, text[:8], progress=False)
    assert report.data.calibration_tokens == sum(b["input_ids"].numel() for b in text[:6])
    with pytest.raises(DataError, match="cuts are priced"):
        compress(tiny_llama(), CONFIG, text[:1], progress=False)
    roles = CompressionArguments(param_ratio=[0.5], measured_prices=True).text_roles()
    assert roles["held_out"] == 32


def test_an_encoder_with_a_task_can_be_priced_on_held_out_sentences():
    model = tiny_bert_classifier()
    config = LowRankConfig(param_ratio=0.5, measured_prices=True)
    report = compress(model, config, sentence_batches(8), progress=False)
    assert report.measured_prices
    assert report.predicted_standard_error > 0
    assert num_lowrank(model)


def test_other_rules_are_refused():
    with pytest.raises(ConfigError, match="measured_prices works on prices"):
        LowRankConfig(param_ratio=0.5, metric="whitened", measured_prices=True)


def test_prices_without_held_out_text_are_refused_before_any_work(text, monkeypatch):
    def no_work(*args, **kwargs):
        pytest.fail("worked")

    monkeypatch.setattr("hf_lowrank.compression.application.analyze", no_work)
    with pytest.raises(DataError, match=r"measured_prices needs held-out text; pass held_out\."):
        compress(tiny_llama(), CONFIG, text[:4], held_out=[], progress=False)


def test_the_better_plan_is_taken_where_second_order_sees_nothing(text, monkeypatch):
    """Effects made blind to one kind of layer, whose cut then looks free and is not."""
    model = tiny_llama()
    config = CONFIG.replace(param_ratio=0.85, channels=False)
    targets = find_targets(model, config)
    run = quiet_run(text[:6], text[6:])
    analysis = analyze(model, targets, config, run)
    held_out = analysis.held_out
    blind = {
        name: Effects(1e-4 * each.items, 1e-8 * each.squares) if "up_proj" in name else each
        for name, each in held_out.ranks.items()
    }
    analysis.held_out = dataclasses.replace(held_out, ranks=blind)
    priced_plan = analysis.priced(
        analysis.plan_for_ratio(0.85), model_parts(model, analysis.shapes)
    )[0].plan_for_ratio(0.85)
    kept = {n: r or 32 for n, r in priced_plan.ranks.items()}
    assert all(
        kept[n] < 0.7 * r
        for n, r in analysis.plan_for_ratio(0.85).ranks.items()
        if r and "up_proj" in n
    )
    found = decide(model, analysis, run)
    assert found.plan.choices == analysis.plan_for_ratio(0.85).choices
    assert not found.parts
    assert found.analysis.standard_error(found.plan) is None
    analysis.held_out = held_out
    sound = decide(model, analysis, run)
    assert sound.parts or sound.plan.choices == analysis.plan_for_ratio(0.85).choices
    assert num_lowrank(model) == 0


def test_prices_of_experts_follow_the_others(text, analysis):
    experts = ExpertOrder(
        "experts",
        None,
        1,
        8,
        torch.arange(4).repeat(2, 1),
        [2, 4],
        torch.tensor([[0.5, 0.0], [0.25, 0.0]], dtype=torch.float64),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        torch.eye(4).repeat(2, 1, 1),
    )
    plan = analysis.plan_for_ratio(0.5)
    both = dataclasses.replace(analysis, orders={**analysis.orders, "experts": experts})
    found, parts = both.priced(plan, model_parts(tiny_llama(), plan.ranks))
    factor = sum(part.measured for part in parts) / sum(part.predicted for part in parts)
    assert factor != pytest.approx(1.0, abs=0.01)
    assert torch.allclose(found.orders["experts"].narrower, factor * experts.narrower)
    assert torch.allclose(found.orders["experts"].drops, factor * experts.drops)
