"""What shapes take to run: measured, and interpolated between what was measured."""

import dataclasses

import pytest
from torch import nn

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.compression import analysis, goals
from hf_lowrank.compression.goals import check_goal
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.measuring.shape_times import PHASES, ShapeTimes, shape_times
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.report.text.table import describe_run, format_report
from tests.tiny_models import tiny_llama, token_batches

SHAPE, WIDE, SQUARE = (8, 8), (32, 8), (5, 5)


def hand_made():
    seconds = {SHAPE: 1.0, WIDE: 3.0, SQUARE: 2.0}
    each = {
        "dense": seconds,
        "ranked": {SHAPE: {2: 0.6, 4: 1.2}, WIDE: {2: 1.0, 4: 2.0}, SQUARE: {2: 1.96, 4: 2.5}},
        "rows": {SHAPE: {4: 0.6, 8: 1.0}, WIDE: {16: 2.0, 32: 3.0}},
        "columns": {SHAPE: {4: 0.5, 8: 1.0}, WIDE: {4: 2.0, 8: 3.0}},
    }
    twice = {kind: dict.fromkeys(PHASES, found) for kind, found in each.items()}
    return ShapeTimes(**twice, totals=dict.fromkeys(PHASES, 4.0))


@pytest.mark.parametrize(
    ("shape", "rank", "seconds"),
    [
        (SHAPE, None, 1.0),
        (SHAPE, 3, 0.9),
        (SHAPE, 4, 1.2),
        (SQUARE, 2, 2.0),  # 1.96 is no gain over 2.0
        (SQUARE, 4, 2.5),
        (SHAPE, 6, 1.8),  # beyond what was timed
        (SHAPE, 1, 0.3),
        ((6, 8), None, 0.8),  # a smaller square is nearer than a wide one
        ((24, 8), None, 2.5),
        ((32, 6), None, 2.5),
        ((8, 6), None, 0.75),
    ],
)
def test_times_between_the_measured_ones_are_interpolated(shape, rank, seconds):
    assert hand_made()(shape, rank) == pytest.approx(seconds / 4)


def test_a_shape_that_comes_from_none_is_an_error():
    with pytest.raises(ValueError, match="No layer of 40 x 8 or larger was timed"):
        hand_made()((40, 8), None)


def test_a_plan_is_the_sum_of_its_layers():
    plan = RankPlan({"a": 3, "b": None}, {"a": SHAPE, "b": WIDE}, {"b": (24, 8)}, form="compact")
    assert hand_made().of_plan(plan) == pytest.approx(dict.fromkeys(PHASES, (0.9 + 2.5) / 4))


def test_measured_times_of_dense_layers_sum_to_one_and_rise_with_size():
    layers = {str(i): nn.Linear(256, 512 >> i, bias=False) for i in (0, 3)}
    layers["again"] = nn.Linear(256, 512, bias=False)
    times = shape_times(layers, "compact")
    assert 2 * times((512, 256), None) + times((64, 256), None) == pytest.approx(1)
    assert times((64, 256), None) < times((512, 256), None)
    assert times((512, 256), 16) < times((512, 256), 192)
    assert shape_times(layers, "compact") is times  # once in a process


def as_numbers(targets, form):
    """Times as if a number took a second, but for a fixed cost of each call."""
    shapes = [linear_shape(layer) for layer in targets.values()]
    dense = {shape: 1.0 * shape[0] * shape[1] + 64 for shape in shapes}
    ranked = {(m, n): {k: k * (m + n - k) + 128.0 for k in (1, 8, 16)} for m, n in shapes}
    rows = {(m, n): {k: 1.0 * k * n + 64 for k in (1, m)} for m, n in shapes}
    columns = {(m, n): {k: 1.0 * k * m + 64 for k in (1, n)} for m, n in shapes}
    each = {"dense": dense, "ranked": ranked, "rows": rows, "columns": columns}
    twice = {kind: dict.fromkeys(PHASES, found) for kind, found in each.items()}
    return ShapeTimes(**twice, totals=dict.fromkeys(PHASES, sum(dense[s] for s in shapes)))


@pytest.mark.default_recipe
def test_a_model_within_a_share_of_the_time_says_what_it_takes(monkeypatch):
    for user in (analysis, goals):
        monkeypatch.setattr(user, "shape_times", as_numbers)
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    config = LowRankConfig(param_ratio=0.7, objective="latency")
    report = compress(model, config, token_batches(), held_out=token_batches())
    assert report.predicted_time.keys() == PHASES.keys()
    assert all(0.5 < share <= 0.7 + 1e-6 for share in report.predicted_time.values())
    assert report.config.objective == "latency"
    assert "70.0% of the targeted layers' time kept" in describe_run(report)
    said = "targeted layers' time over dense, as their shapes were timed: decode 0."
    assert said in format_report(report)


def slow_ranks(targets, form):
    found = as_numbers(targets, form)
    each = {phase: {s: {1: 1e6, 8: 1e6} for s in points} for phase, points in found.ranked.items()}
    return dataclasses.replace(found, ranked=each)


def of_shapes(*shapes):
    return {str(i): nn.Linear(n, m, bias=False) for i, (m, n) in enumerate(shapes)}


def test_what_can_be_met_is_not_refused_where_ranks_are_slow(monkeypatch):
    monkeypatch.setattr(goals, "shape_times", slow_ranks)
    config = LowRankConfig(param_ratio=1.0, objective="latency", channels=False)
    check_goal(of_shapes((64, 64), (128, 64)), config)
    with pytest.raises(ConfigError, match=r"take 1\.000 of the dense layers' time"):
        check_goal(of_shapes((64, 64), (128, 64)), config.replace(param_ratio=0.99))


@pytest.mark.parametrize("settings", [{"min_rank": 40}, {"rank_pattern": {"*": None}}])
def test_what_holds_a_layer_large_counts_in_the_early_check(settings, monkeypatch):
    monkeypatch.setattr(goals, "shape_times", as_numbers)
    config = LowRankConfig(param_ratio=0.3, objective="latency", channels=False)
    check_goal(of_shapes((64, 64), (128, 64)), config)
    with pytest.raises(ConfigError, match="smallest ranks and widths take"):
        check_goal(of_shapes((64, 64), (128, 64)), config.replace(**settings))


def test_a_config_with_ranks_is_made_again_without_a_clock(monkeypatch):
    monkeypatch.setattr(goals, "shape_times", slow_ranks)
    config = LowRankConfig(param_ratio=0.5, objective="latency", ranks={"0": 3})
    check_goal(of_shapes((64, 64)), config)


def test_layers_of_two_columns_have_a_time():
    times = shape_times(of_shapes((32, 2), (32, 32)), "factors")
    assert times((32, 2), 1) >= 0


@pytest.mark.default_recipe
def test_a_tolerance_is_met_by_channels_alone(monkeypatch):
    for user in (analysis, goals):
        monkeypatch.setattr(user, "shape_times", as_numbers)
    config = LowRankConfig(loss_tolerance=1.0, objective="latency", channels_only=True)
    report = compress(tiny_llama(), config, token_batches(), held_out=token_batches())
    assert report.probes
    assert report.narrowed


def test_a_share_that_no_plan_can_reach_is_refused_before_any_long_work():
    layers = {"a": nn.Linear(8, 8, bias=False)}
    config = LowRankConfig(param_ratio=0.0001, objective="latency")
    with pytest.raises(ConfigError, match=r"smallest ranks and widths take .* raise param_ratio"):
        check_goal(layers, config)


@pytest.mark.parametrize(
    "settings",
    [{"metric": "plain"}, {"rule": "uniform"}, {"weights": "int8"}],
)
def test_it_needs_prices_and_plain_weights(settings):
    with pytest.raises(ConfigError, match="objective 'latency' needs rule 'price'"):
        LowRankConfig(param_ratio=0.8, objective="latency", **settings)


def test_goals_that_read_no_objective_refuse_it():
    with pytest.raises(ConfigError, match="objective='latency' would do nothing with goal 'rank'"):
        LowRankConfig(rank=4, objective="latency")
