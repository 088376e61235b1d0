"""Rank plans: what they refuse and what they count."""

import dataclasses

import pytest

from hf_lowrank.errors import ConfigError
from hf_lowrank.ranks.plan import ExpertsPlan, RankPlan, layer_cost, useful_rank

SHAPES = {"a": (6, 4), "b": (3, 5)}


def test_parameters_are_counted_from_ranks():
    plan = RankPlan({"a": 2, "b": None}, SHAPES)
    assert plan.dense_parameters == 24 + 15
    assert plan.kept_parameters == 2 * (6 + 4) + 15
    assert plan.param_ratio == 35 / 39


def test_experts_are_cut_where_there_are_fewer_or_narrower_ones():
    left = [(4, 8), (3, 8), (4, 7)]
    assert [ExpertsPlan(*each, (4, 8), 6).is_cut for each in left] == [False, True, True]


def test_a_dense_plan_keeps_everything():
    assert RankPlan(dict.fromkeys(SHAPES), SHAPES).param_ratio == 1.0


@pytest.mark.parametrize(("rank", "cost"), [(1, 10), (3, 30), (None, 24)])
def test_cost_of_a_layer(rank, cost):
    assert layer_cost((6, 4), rank) == cost


@pytest.mark.parametrize(
    ("shape", "rank", "useful"),
    [
        ((6, 4), 2, 2),  # 20 of 24 parameters
        ((6, 4), 3, None),
        ((6, 3), 1, 1),  # 9 of 18
        ((6, 3), 2, None),  # 18 of 18: no gain
        ((100, 1), 1, None),
    ],
)
def test_ranks_without_gain_are_not_useful(shape, rank, useful):
    assert useful_rank(shape, rank) == useful


@pytest.mark.parametrize(
    ("ranks", "odd"), [({"a": 1}, "b"), ({"a": 1, "b": 1, "z": 2, "c": 1}, "c, z"), ({}, "a, b")]
)
def test_names_must_match(ranks, odd):
    with pytest.raises(ConfigError, match=f"^Ranks and layers do not match: {odd}; give a rank, "):
        RankPlan(ranks, SHAPES)


def test_at_most_five_odd_names_are_listed():
    with pytest.raises(ConfigError, match=r"do not match: 0, 1, 2, 3, 4; give a rank"):
        RankPlan({str(index): 1 for index in range(9)}, {})


@pytest.mark.parametrize(("name", "rank"), [("a", 0), ("a", 5), ("a", -1), ("b", 4)])
def test_ranks_outside_their_limits_are_refused(name, rank):
    rows, columns = SHAPES[name]
    message = rf"^{name}: rank {rank} is outside 1\.\.min\({rows}, {columns}\); change the rank or"
    with pytest.raises(ConfigError, match=message):
        RankPlan({**dict.fromkeys(SHAPES), name: rank}, SHAPES)


@pytest.mark.parametrize(("name", "rank"), [("a", 1), ("a", 4), ("b", 3), ("b", None)])
def test_ranks_at_their_limits_are_accepted(name, rank):
    assert RankPlan({**dict.fromkeys(SHAPES), name: rank}, SHAPES).ranks[name] == rank


def test_plans_are_frozen():
    plan = RankPlan({"a": 2, "b": None}, SHAPES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.ranks = {}


@pytest.mark.parametrize(("ranks", "narrowed"), [({"a": 2}, (3, 4)), ({"a": None}, (9, 9))])
def test_shapes_that_no_layer_can_be_narrowed_to_are_refused(ranks, narrowed):
    message = r"^a: can't be narrowed to \(\d, \d\), at rank .*; narrowed layers have no rank "
    with pytest.raises(ConfigError, match=message):
        RankPlan(ranks, {"a": SHAPES["a"]}, {"a": narrowed})
