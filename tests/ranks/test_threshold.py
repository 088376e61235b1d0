"""Plans by threshold and by budget: small ones by hand, and what is refused."""

import numpy as np
import pytest

from hf_lowrank.errors import ConfigError
from hf_lowrank.ranks.plan import layer_cost
from hf_lowrank.ranks.threshold import (
    check_budget,
    plan_for_budget,
    plan_for_threshold,
    smallest_ratio,
    uniform_plan,
)
from tests.ranks import SHAPES, SPECTRA, THRESHOLD_RULES, every_rule, priced_spectrum


@pytest.mark.parametrize(
    ("threshold", "ranks"),
    [(1.0, (1, 1)), (0.5, (2, 3)), (0.25, (None, 3)), (0.2, (None, None)), (2.0, (1, 1))],
)
def test_a_score_at_the_threshold_is_kept(threshold, ranks):
    """wide breaks even at rank 3 of 4, square at rank 4 of 8."""
    plan = plan_for_threshold(SHAPES, SPECTRA, "relative", threshold)
    assert tuple(plan.ranks.values()) == ranks


def test_thresholds_respect_fixed_ranks_and_the_least_rank():
    plan = plan_for_threshold(
        {**SHAPES, "failed": (5, 5)}, SPECTRA, "relative", 0.99,
        min_rank=2, fixed={"wide": 1, "failed": None},
    )  # fmt: skip
    assert plan.ranks == {"wide": 1, "square": 2, "failed": None}


def test_a_least_rank_beyond_the_break_even_rank_is_dense():
    for plan in (
        plan_for_threshold(SHAPES, SPECTRA, "relative", 0.9, min_rank=3),
        plan_for_budget(SHAPES, SPECTRA, "relative", 0.9, min_rank=3),
    ):
        assert plan.ranks["wide"] is None
        assert plan.ranks["square"] == 3


def test_the_last_step_to_dense_costs_less_than_a_component():
    """square: rank 3 costs 48, dense 64; wide: rank 2 costs 32, dense 48."""
    plan = plan_for_budget(SHAPES, SPECTRA, "relative", (64 + 32) / 112)
    assert plan.ranks == {"wide": None, "square": 3}
    shapes = {"a": (7, 7)}  # rank 3 costs 42 of 49: only 7 are missing
    spectra = {"a": priced_spectrum((7, 7), [1.0] * 7)}
    assert plan_for_budget(shapes, spectra, "energy", 48 / 49).ranks == {"a": 3}
    assert plan_for_budget(shapes, spectra, "energy", 49 / 49).ranks == {"a": None}


def test_a_step_that_does_not_fit_leaves_the_rest_to_other_layers():
    shapes = {"large": (20, 20), "small": (4, 4)}
    spectra = {
        "large": priced_spectrum((20, 20), [1.0] * 20),
        "small": priced_spectrum((4, 4), [1.0, 0.01, 0.01, 0.01]),
    }
    # One component each is 48; the next of large costs 40, that of small 8.
    plan = plan_for_budget(shapes, spectra, "relative", (48 + 39) / 416)
    assert plan.ranks == {"large": 1, "small": None}
    plan = plan_for_budget(shapes, spectra, "relative", (48 + 40) / 416)
    assert plan.ranks == {"large": 2, "small": 1}


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
def test_other_rules_take_one_component_at_a_time(rule):
    shapes = {"flat": (6, 6), "steep": (6, 6)}
    spectra = {
        "flat": priced_spectrum((6, 6), [1.0] * 6),
        "steep": priced_spectrum((6, 6), [1.0, 0.999, 0.0, 0.0, 0.0, 0.0]),
    }
    ranks = plan_for_budget(shapes, spectra, rule, 36 / 72).ranks
    assert ranks == ({"flat": 1, "steep": 2} if rule == "energy" else {"flat": 2, "steep": 1})


def test_uniform_ratios_are_nearly_equal():
    shapes = {"a": (60, 20), "b": (40, 40), "c": (16, 100), "d": (64, 64)}
    spectra = {name: priced_spectrum(shape, [1.0] * min(shape)) for name, shape in shapes.items()}
    for ratio in (0.2, 0.5, 0.8):
        plan = plan_for_budget(shapes, spectra, "uniform", ratio)
        for name, (m, n) in shapes.items():
            share = layer_cost((m, n), plan.ranks[name]) / (m * n)
            assert abs(share - ratio) <= (m + n) / (m * n)


def test_what_a_budget_leaves_beside_the_smallest_ranks():
    assert check_budget(SHAPES, 32 / 112) == 0
    assert check_budget(SHAPES, 0.5) == 56 - 32
    assert check_budget(SHAPES, 0.6, min_rank=2) == 67 - 64
    assert check_budget(SHAPES, 0.6, fixed={"wide": None}) == 67 - 64
    with pytest.raises(ConfigError, match=r"^param_ratio 0\.25 allows 28 .* need 32; raise"):
        check_budget(SHAPES, 0.25)


@pytest.mark.parametrize(
    ("min_rank", "fixed", "cost"),
    [
        (1, {}, 16 + 16),
        (2, {}, 32 + 32),
        (3, {}, 48 + 48),
        (4, {}, 48 + 64),
        (99, {}, 48 + 64),
        (1, {"wide": None}, 48 + 16),
        (2, {"square": 3}, 32 + 48),
    ],
)
def test_the_smallest_ratio_by_hand(min_rank, fixed, cost):
    assert smallest_ratio(SHAPES, min_rank=min_rank, fixed=fixed) == cost / 112
    if min_rank == 1:
        assert smallest_ratio(SHAPES, fixed=fixed or None) == cost / 112


@pytest.mark.parametrize(
    ("rank", "ranks"),
    [(1, (1, 1)), (2, (2, 2)), (3, (None, 3)), (4, (None, None)), (9, (None,) * 2)],
)
def test_one_rank_for_all_is_dense_where_it_saves_nothing(rank, ranks):
    assert tuple(uniform_plan(SHAPES, rank).ranks.values()) == ranks


def test_one_rank_for_all_but_the_fixed():
    shapes = {**SHAPES, "failed": (9, 9)}
    plan = uniform_plan(shapes, 2, {"wide": 3, "failed": None})
    assert plan.ranks == {"wide": 3, "square": 2, "failed": None}


# Layers cut before


def cut_before(shapes, spectra, kept):
    """Spectra of layers that were cut to `kept` components before."""
    return {
        name: priced_spectrum(shapes[name], spectrum.sigma[:kept].tolist())
        for name, spectrum in spectra.items()
    }


@every_rule
def test_a_layer_cut_before_never_grows_beyond_what_it_still_has(rule):
    shapes = {"a": (12, 12), "b": (12, 12)}
    whole = {
        "a": priced_spectrum((12, 12), np.linspace(2, 1, 12)),
        "b": priced_spectrum((12, 12), np.linspace(1, 0.1, 12)),
    }
    thin = cut_before(shapes, whole, 4)
    assert plan_for_budget(shapes, thin, rule, 1.0).ranks == {"a": 4, "b": 4}
    assert plan_for_budget(shapes, whole, rule, 1.0).ranks == {"a": None, "b": None}
    budget = 6 * 24 / 288
    ranks = plan_for_budget(shapes, thin, rule, budget).ranks
    assert sum(ranks.values()) == 6
    assert max(ranks.values()) <= 4


@every_rule
def test_a_layer_cut_before_can_be_cut_to_one(rule):
    shapes = {"a": (12, 12)}
    thin = {"a": priced_spectrum((12, 12), [1.0])}
    assert plan_for_budget(shapes, thin, rule, 0.9, min_rank=3).ranks == {"a": 1}


def test_a_layer_with_fewer_components_than_the_least_rank_leaves_the_rest_to_others():
    shapes = {"thin": (12, 12), "whole": (12, 12)}
    spectra = {
        "thin": priced_spectrum((12, 12), [1.0]),
        "whole": priced_spectrum((12, 12), np.linspace(1, 0.1, 12)),
    }
    plan = plan_for_budget(shapes, spectra, "relative", (1 + 4) * 24 / 288, min_rank=2)
    assert plan.ranks == {"thin": 1, "whole": 4}


# Refusals


@every_rule
def test_a_budget_that_is_too_small_says_what_is_needed(rule):
    message = (
        r"^param_ratio 0\.2 allows 22 parameters, but the smallest ranks \(min_rank 1, and layers "
        r"fixed by rank_pattern\) need 32; raise param_ratio\.$"
    )
    with pytest.raises(ConfigError, match=message):
        plan_for_budget(SHAPES, SPECTRA, rule, 0.2)


def test_a_budget_that_is_too_small_counts_floors_and_fixed_ranks():
    with pytest.raises(ConfigError, match=r"allows 56 .*\(min_rank 2, .* need 64;"):
        plan_for_budget(SHAPES, SPECTRA, "relative", 0.5, min_rank=2)
    with pytest.raises(ConfigError, match=r"allows 56 .* need 64;"):
        plan_for_budget(SHAPES, SPECTRA, "relative", 0.5, fixed={"wide": None})
    shapes, fixed = {**SHAPES, "failed": (2, 1)}, {"wide": None, "failed": None}
    with pytest.raises(ConfigError, match=r"allows 56 .* need 66;"):
        plan_for_budget(shapes, SPECTRA, "relative", 56.1 / 114, fixed=fixed)
