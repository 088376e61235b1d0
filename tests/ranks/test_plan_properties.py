"""Plans by threshold and by budget: properties on random instances."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowrank.errors import ConfigError
from hf_lowrank.ranks.plan import break_even_rank, layer_cost, useful_rank
from hf_lowrank.ranks.rules import RULES
from hf_lowrank.ranks.threshold import plan_for_budget, plan_for_threshold, smallest_ratio
from tests.ranks import THRESHOLD_RULES, dense_cost, every_rule, priced_spectrum, random_instance

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
instances = st.builds(random_instance, st.integers(0, 10**6), st.integers(1, 6))


def cost_of_next(shape, rank):
    return layer_cost(shape, useful_rank(shape, rank + 1)) - layer_cost(shape, rank)


@every_rule
@quick
@given(instance=instances, share=st.floats(0, 1), min_rank=st.integers(1, 3))
def test_a_budget_is_kept_and_spent_to_within_one_component(rule, instance, share, min_rank):
    shapes, spectra = instance
    smallest = smallest_ratio(shapes, min_rank=min_rank)
    ratio = smallest + share * (1 - smallest)
    plan = plan_for_budget(shapes, spectra, rule, ratio, min_rank=min_rank)
    budget = ratio * dense_cost(shapes) + 1e-6
    assert plan.kept_parameters <= budget
    for name, rank in plan.ranks.items():
        if rank is not None:
            assert min(min_rank, *shapes[name]) <= rank < break_even_rank(*shapes[name])
            assert plan.kept_parameters + cost_of_next(shapes[name], rank) > budget - 1
    assert list(plan.ranks) == list(shapes)


@every_rule
@quick
@given(instance=instances, min_rank=st.integers(1, 3))
def test_the_smallest_ratio_is_accepted_and_nothing_below(rule, instance, min_rank):
    shapes, spectra = instance
    smallest = smallest_ratio(shapes, min_rank=min_rank)
    plan = plan_for_budget(shapes, spectra, rule, smallest, min_rank=min_rank)
    assert plan.kept_parameters == round(smallest * dense_cost(shapes))
    below = smallest - 0.5 / dense_cost(shapes)
    with pytest.raises(ConfigError, match=f"^param_ratio {below} allows"):
        plan_for_budget(shapes, spectra, rule, below, min_rank=min_rank)


@every_rule
@quick
@given(instance=instances)
def test_a_ratio_of_one_is_dense(rule, instance):
    shapes, spectra = instance
    assert set(plan_for_budget(shapes, spectra, rule, 1.0).ranks.values()) == {None}


@every_rule
@quick
@given(instance=instances, share=st.floats(0, 1), data=st.data())
def test_fixed_ranks_stay_and_count(rule, instance, share, data):
    """Layers whose decomposition failed are fixed to dense and have no spectrum."""
    shapes, spectra = instance
    names = sorted(shapes)
    fixed = {name: data.draw(st.integers(1, min(shapes[name]))) for name in names[:1]}
    fixed |= dict.fromkeys(names[1:2])
    spectra = {name: spectra[name] for name in spectra if name not in names[1:2]}
    smallest = smallest_ratio(shapes, fixed=fixed)
    ratio = smallest + share * max(1 - smallest, 0)
    plan = plan_for_budget(shapes, spectra, rule, ratio, fixed=fixed)
    assert plan.kept_parameters <= ratio * dense_cost(shapes) + 1e-6
    assert fixed.items() <= plan.ranks.items()
    assert plan.shapes == shapes


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
@quick
@given(instance=instances, quantile=st.floats(0, 1))
def test_a_budget_equal_to_what_a_threshold_keeps_gives_its_plan(rule, instance, quantile):
    shapes, spectra = instance
    scores = torch.cat([RULES[rule](spectrum) for spectrum in spectra.values()])
    threshold = float(scores.quantile(quantile, interpolation="nearest"))
    plan = plan_for_threshold(shapes, spectra, rule, threshold)
    again = plan_for_budget(shapes, spectra, rule, plan.param_ratio)
    assert again.ranks == plan.ranks


def as_numbers(plan):
    return [break_even_rank(*plan.shapes[n]) if r is None else r for n, r in plan.ranks.items()]


@every_rule
@quick
@given(instance=instances)
def test_ranks_fall_as_the_threshold_rises(rule, instance):
    shapes, spectra = instance
    scores = torch.cat([RULES[rule](spectrum) for spectrum in spectra.values()])
    thresholds = [-np.inf, *sorted(set(scores.tolist())), np.inf]
    plans = [as_numbers(plan_for_threshold(shapes, spectra, rule, t)) for t in thresholds]
    for lower, higher in itertools.pairwise(plans):
        assert all(a >= b for a, b in zip(lower, higher, strict=True))
    assert set(plan_for_threshold(shapes, spectra, rule, -np.inf).ranks.values()) == {None}
    assert plans[-1] == [1] * len(shapes)


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
@quick
@given(instance=instances, first=st.floats(0, 1), second=st.floats(0, 1))
def test_a_larger_budget_keeps_all_that_a_threshold_within_it_keeps(rule, instance, first, second):
    """Beyond that, what a small budget had left may have gone to a layer with cheap components."""
    shapes, spectra = instance
    scores = torch.cat([RULES[rule](spectrum) for spectrum in spectra.values()])
    threshold = float(scores.quantile(first, interpolation="nearest"))
    plan = plan_for_threshold(shapes, spectra, rule, threshold)
    larger = plan.param_ratio + second * (1 - plan.param_ratio)
    budget_plan = plan_for_budget(shapes, spectra, rule, larger)
    assert all(a <= b for a, b in zip(as_numbers(plan), as_numbers(budget_plan), strict=True))


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
def test_ranks_of_equal_layers_rise_with_the_budget(rule):
    """Where the last step to dense costs as much as any other: 5 x 32 of 192 at rank 5."""
    rng = np.random.default_rng(0)
    shapes = {str(index): (24, 8) for index in range(4)}
    spectra = {
        name: priced_spectrum(shape, np.sort(rng.exponential(size=8))[::-1])
        for name, shape in shapes.items()
    }
    ratios = np.linspace(smallest_ratio(shapes), 1, 40)
    plans = [as_numbers(plan_for_budget(shapes, spectra, rule, ratio)) for ratio in ratios]
    assert plans[0] != plans[-1]
    for smaller, larger in itertools.pairwise(plans):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))


def naive_plan(shapes, spectra, rule, threshold, min_rank=1):
    """`plan_for_threshold` for `relative` and `energy`, component by component."""
    ranks = {}
    for name, (m, n) in shapes.items():
        sigma = spectra[name].sigma.numpy()
        rank = 0
        for value in sigma:
            if rule == "relative":
                keep = value / sigma[0] >= threshold
            else:
                keep = value**2 / np.sum(sigma**2) >= threshold
            rank += int(keep)
        rank = max(rank, min_rank)
        ranks[name] = rank if rank * (m + n) < m * n else None
    return ranks


@pytest.mark.parametrize("rule", ["relative", "energy"])
@quick
@given(
    instance=instances,
    threshold=st.floats(0.001, 1.1).filter(lambda value: value != 1.0),
    min_rank=st.integers(1, 2),
)
def test_thresholds_equal_a_naive_count(rule, instance, threshold, min_rank):
    shapes, spectra = instance
    plan = plan_for_threshold(shapes, spectra, rule, threshold, min_rank=min_rank)
    assert plan.ranks == naive_plan(shapes, spectra, rule, threshold, min_rank)


@every_rule
def test_the_order_of_the_layers_does_not_matter(rule):
    shapes, spectra = random_instance(3, num_layers=6)
    turned = dict(reversed(shapes.items())), dict(reversed(spectra.items()))
    for ratio in (0.6, 0.8, 0.95):
        one = plan_for_budget(shapes, spectra, rule, ratio).ranks
        assert one == plan_for_budget(*turned, rule, ratio).ranks


@every_rule
def test_spectra_are_not_changed_and_plans_repeat(rule):
    shapes, spectra = random_instance(5)
    before = {name: spectrum.sigma.clone() for name, spectrum in spectra.items()}
    first = plan_for_budget(shapes, spectra, rule, 0.7, fixed={"layer.1": None})
    assert first == plan_for_budget(shapes, spectra, rule, 0.7, fixed={"layer.1": None})
    assert all(torch.equal(before[name], spectra[name].sigma) for name in spectra)
