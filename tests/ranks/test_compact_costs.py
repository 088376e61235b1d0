"""Ranks for the compact form, whose next rank costs the less the higher the rank."""

import itertools

import pytest
import torch

from hf_lowrank.ranks.plan import RankPlan, break_even_rank, layer_cost, useful_rank
from hf_lowrank.ranks.rules import RULES
from hf_lowrank.ranks.threshold import (
    plan_for_budget,
    plan_for_threshold,
    predicted_rise,
    smallest_ratio,
    uniform_plan,
)
from tests.ranks import dense_cost, every_rule, priced_spectrum, random_instance


def test_a_rank_costs_its_free_numbers_and_never_more_than_the_matrix():
    for shape in ((4, 12), (12, 4), (8, 8)):
        costs = [layer_cost(shape, rank, "compact") for rank in range(1, min(shape) + 1)]
        assert costs == [k * (sum(shape) - k) for k in range(1, min(shape) + 1)]
        assert costs == sorted(costs)
        assert costs[-1] == layer_cost(shape, None)
        assert break_even_rank(*shape, "compact") == min(shape)
        assert useful_rank(shape, min(shape) - 1, "compact") == min(shape) - 1
        assert useful_rank(shape, min(shape), "compact") is None


def test_a_plan_counts_what_its_form_stores():
    plan = RankPlan({"a": 3, "b": None}, {"a": (8, 6), "b": (5, 5)}, form="compact")
    assert plan.kept_parameters == 3 * (8 + 6 - 3) + 25


@every_rule
def test_scores_never_rise_with_the_rank(rule):
    for seed in range(20):
        for spectrum in random_instance(seed)[1].values():
            scores = RULES[rule](spectrum, "compact")
            assert len(scores) == len(spectrum.sigma)
            assert bool((scores[1:] <= scores[:-1] + 1e-12).all())


def test_components_that_are_cheaper_together_have_one_score():
    """Equal prices: the later ranks are cheaper, so that all of the layer is the best buy."""
    spectrum = priced_spectrum((6, 6), [1.0] * 6, scale=0.06)
    scores = RULES["price"](spectrum, "compact")
    torch.testing.assert_close(scores, torch.full((6,), 0.36 / 36, dtype=torch.float64))


@every_rule
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8, 0.95])
def test_a_budget_is_spent_to_within_one_component(rule, ratio):
    for seed in range(20):
        shapes, spectra = random_instance(seed)
        if smallest_ratio(shapes, form="compact") > ratio:
            continue
        plan = plan_for_budget(shapes, spectra, rule, ratio, form="compact")
        left = int(ratio * dense_cost(shapes)) - plan.kept_parameters
        assert plan.form == "compact"
        assert left >= 0
        for name, rank in plan.ranks.items():
            if rank is not None:
                following = useful_rank(shapes[name], rank + 1, "compact")
                more = layer_cost(shapes[name], following, "compact")
                assert more - layer_cost(shapes[name], rank, "compact") > left


@pytest.mark.parametrize("seed", range(12))
def test_prices_give_the_best_ranks_at_every_corner_of_the_hulls(seed):
    shapes, spectra = random_instance(seed, num_layers=3, largest=8)
    choices = {
        name: [
            (layer_cost(shape, rank, "compact"), spectra[name].predicted_rise(rank), rank)
            for rank in [*range(1, min(shape)), None]
        ]
        for name, shape in shapes.items()
    }
    for rate in torch.logspace(-6, 0, 25, dtype=torch.float64).tolist():
        chosen = {n: min(c, key=lambda each: each[1] + rate * each[0]) for n, c in choices.items()}
        budget = sum(cost for cost, _, _ in chosen.values())
        best = min(
            sum(rise for _, rise, _ in each)
            for each in itertools.product(*choices.values())
            if sum(cost for cost, _, _ in each) <= budget
        )
        ratio = budget / dense_cost(shapes)
        plan = plan_for_budget(shapes, spectra, "price", ratio, form="compact")
        assert predicted_rise(spectra, plan) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_the_same_budget_buys_more_ranks_than_two_factors():
    shapes, spectra = random_instance(1, largest=30)
    for ratio in (0.5, 0.7, 0.9):
        factors = plan_for_budget(shapes, spectra, "price", ratio)
        compact = plan_for_budget(shapes, spectra, "price", ratio, form="compact")
        assert predicted_rise(spectra, compact) < predicted_rise(spectra, factors)


def test_thresholds_and_one_rank_stop_short_of_the_dense_layer():
    shapes, spectra = random_instance(2)
    plan = plan_for_threshold(shapes, spectra, "relative", 0.0, form="compact")
    assert set(plan.ranks.values()) == {None}
    plan = uniform_plan(shapes, 2, form="compact")
    assert {n for n, rank in plan.ranks.items() if rank is None} == {
        n for n, shape in shapes.items() if min(shape) == 2
    }
