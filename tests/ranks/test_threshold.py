"""Plans by threshold and by budget: properties on random instances, and small ones by hand."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import ConfigError
from hf_lowrank.modeling_lowrank import break_even_rank
from hf_lowrank.ranks.plan import layer_cost, useful_rank
from hf_lowrank.ranks.rules import RULES
from hf_lowrank.ranks.threshold import (
    check_budget,
    plan_for_budget,
    plan_for_threshold,
    predicted_rise,
    smallest_ratio,
    uniform_plan,
)

THRESHOLD_RULES = ["energy", "relative", "uniform"]
every_rule = pytest.mark.parametrize("rule", sorted(RULES))
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def spectrum_of(shape, sigma, scale=0.01):
    sigma = torch.as_tensor(np.array(sigma, dtype=float))
    m, n = shape
    return Spectrum(torch.zeros(m, len(sigma)), torch.zeros(len(sigma), n), sigma, scale * sigma**2)


def random_instance(seed, num_layers=4, largest=9):
    """Shapes and spectra of layers that differ in shape, scale and decay; some have ties."""
    rng = np.random.default_rng(seed)
    shapes, spectra = {}, {}
    for index in rng.permutation(num_layers):
        m, n = (int(size) for size in rng.integers(2, largest + 1, size=2))
        sigma = rng.exponential(size=min(m, n)) * np.exp(-rng.uniform(0, 2) * np.arange(min(m, n)))
        if rng.random() < 0.2:
            sigma[:] = sigma[0]
        sigma = np.sort(sigma * np.exp(rng.normal()))[::-1]
        shapes[f"layer.{index}"] = (m, n)
        spectra[f"layer.{index}"] = spectrum_of((m, n), sigma)
    return shapes, spectra


def dense_cost(shapes):
    return sum(m * n for m, n in shapes.values())


def cost_of_next(shape, rank):
    return layer_cost(shape, useful_rank(shape, rank + 1)) - layer_cost(shape, rank)


instances = st.builds(random_instance, st.integers(0, 10**6), st.integers(1, 6))


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
        name: spectrum_of(shape, np.sort(rng.exponential(size=8))[::-1])
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


SHAPES = {"wide": (4, 12), "square": (8, 8)}
SPECTRA = {
    "wide": spectrum_of((4, 12), [4.0, 2.0, 1.0, 0.5]),
    "square": spectrum_of((8, 8), [10.0, 8.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1]),
}


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
    spectra = {"a": spectrum_of((7, 7), [1.0] * 7)}
    assert plan_for_budget(shapes, spectra, "energy", 48 / 49).ranks == {"a": 3}
    assert plan_for_budget(shapes, spectra, "energy", 49 / 49).ranks == {"a": None}


def test_a_step_that_does_not_fit_leaves_the_rest_to_other_layers():
    shapes = {"large": (20, 20), "small": (4, 4)}
    spectra = {
        "large": spectrum_of((20, 20), [1.0] * 20),
        "small": spectrum_of((4, 4), [1.0, 0.01, 0.01, 0.01]),
    }
    # One component each is 48; the next of large costs 40, that of small 8.
    plan = plan_for_budget(shapes, spectra, "relative", (48 + 39) / 416)
    assert plan.ranks == {"large": 1, "small": None}
    plan = plan_for_budget(shapes, spectra, "relative", (48 + 40) / 416)
    assert plan.ranks == {"large": 2, "small": 1}


def test_the_price_of_a_jump_to_dense_is_that_of_all_components_it_restores():
    """A flat spectrum is better kept whole than cut where each of its components is cheap."""
    shapes = {"flat": (6, 6), "steep": (6, 6)}
    spectra = {
        "flat": spectrum_of((6, 6), np.sqrt([1.0] * 6), scale=1.0),
        "steep": spectrum_of((6, 6), np.sqrt([3.0, 1.5, 0.0, 0.0, 0.0, 0.0]), scale=1.0),
    }
    plan = plan_for_budget(shapes, spectra, "price", (12 + 36) / 72)
    assert plan.ranks == {"flat": None, "steep": 1}
    assert predicted_rise(spectra, plan) == pytest.approx(1.5)
    # With one component less it is the steep layer's turn, and what is left goes to the flat one.
    plan = plan_for_budget(shapes, spectra, "price", (12 + 35) / 72)
    assert plan.ranks == {"flat": 1, "steep": 2}


@pytest.mark.parametrize("rule", THRESHOLD_RULES)
def test_other_rules_take_one_component_at_a_time(rule):
    shapes = {"flat": (6, 6), "steep": (6, 6)}
    spectra = {
        "flat": spectrum_of((6, 6), [1.0] * 6),
        "steep": spectrum_of((6, 6), [1.0, 0.999, 0.0, 0.0, 0.0, 0.0]),
    }
    ranks = plan_for_budget(shapes, spectra, rule, 36 / 72).ranks
    assert ranks == ({"flat": 1, "steep": 2} if rule == "energy" else {"flat": 2, "steep": 1})


def options(shape, spectrum):
    """(parameters, predicted rise, rank) of everything a layer may be."""
    m, n = shape
    prices = spectrum.price.numpy()
    found = [
        (k * (m + n), prices[k:].sum(), k) for k in range(1, len(prices) + 1) if k * (m + n) < m * n
    ]
    return [*found, (m * n, 0.0, None)]


def best_of_all(shapes, spectra, budget):
    """Least predicted rise of any ranks within the budget."""
    choices = itertools.product(*(options(shapes[n], spectra[n]) for n in shapes))
    return min(
        sum(rise for _, rise, _ in choice)
        for choice in choices
        if sum(cost for cost, _, _ in choice) <= budget
    )


def breakpoint_budgets(shapes, spectra):
    """What the best ranks cost if a parameter costs so and so many nats (Lagrange)."""
    found = set()
    for rate in np.exp(np.linspace(-18, 2, 60)):
        total = 0
        for name in shapes:
            choices = options(shapes[name], spectra[name])
            total += min(choices, key=lambda c: c[1] + rate * c[0])[0]
        found.add(total)
    return sorted(found)


@pytest.mark.parametrize("seed", range(20))
def test_prices_give_the_best_ranks_at_every_breakpoint(seed):
    """Breakpoints of the convex hulls; convex tails and the jump to dense, by brute force."""
    shapes, spectra = random_instance(seed, num_layers=3, largest=10)
    budgets = breakpoint_budgets(shapes, spectra)
    assert len(budgets) >= 3
    for budget in budgets:
        plan = plan_for_budget(shapes, spectra, "price", budget / dense_cost(shapes))
        best = best_of_all(shapes, spectra, budget)
        assert predicted_rise(spectra, plan) == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_between_breakpoints_prices_do_no_worse_than_at_the_last_one(seed):
    shapes, spectra = random_instance(seed, num_layers=3, largest=10)
    dense, breakpoints = dense_cost(shapes), breakpoint_budgets(shapes, spectra)
    for budget in range(breakpoints[0], dense, max(1, dense // 25)):
        plan = plan_for_budget(shapes, spectra, "price", budget / dense)
        last = max(point for point in breakpoints if point <= budget)
        rise = predicted_rise(spectra, plan)
        assert best_of_all(shapes, spectra, budget) <= rise + 1e-12
        assert rise <= best_of_all(shapes, spectra, last) + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_prices_predict_less_damage_than_the_other_rules(seed):
    shapes, spectra = random_instance(seed, num_layers=6, largest=40)
    rises = {
        rule: predicted_rise(spectra, plan_for_budget(shapes, spectra, rule, 0.6)) for rule in RULES
    }
    assert rises["price"] < 0.1 * rises["uniform"]
    assert rises["price"] <= min(rises["energy"], rises["relative"])


def test_predicted_rise_adds_up_over_layers():
    plan = plan_for_threshold(SHAPES, SPECTRA, "relative", 0.5)
    assert plan.ranks == {"wide": 2, "square": 3}
    wide, square = 0.01 * (1 + 0.25), 0.01 * (4 + 1 + 0.25 + 0.04 + 0.01)
    assert predicted_rise(SPECTRA, plan) == pytest.approx(wide + square)


def test_uniform_ratios_are_nearly_equal():
    shapes = {"a": (60, 20), "b": (40, 40), "c": (16, 100), "d": (64, 64)}
    spectra = {name: spectrum_of(shape, [1.0] * min(shape)) for name, shape in shapes.items()}
    for ratio in (0.2, 0.5, 0.8):
        plan = plan_for_budget(shapes, spectra, "uniform", ratio)
        for name, (m, n) in shapes.items():
            share = layer_cost((m, n), plan.ranks[name]) / (m * n)
            assert abs(share - ratio) <= (m + n) / (m * n)


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


def test_prices_need_a_metric_that_has_them():
    plain = {
        name: Spectrum(spectrum.left, spectrum.right, spectrum.sigma, None)
        for name, spectrum in SPECTRA.items()
    }
    with pytest.raises(ConfigError, match=r"^rule 'price' needs metric 'kfac'"):
        plan_for_budget(SHAPES, plain, "price", 0.8)
    with pytest.raises(ConfigError, match=r"^rule 'price' needs metric 'kfac'"):
        plan_for_threshold(SHAPES, plain, "price", 0.1)
    assert np.isnan(predicted_rise(plain, plan_for_budget(SHAPES, plain, "energy", 0.8)))


def cut_before(shapes, spectra, kept):
    """Spectra of layers that were cut to `kept` components before."""
    return {
        name: spectrum_of(shapes[name], spectrum.sigma[:kept].tolist())
        for name, spectrum in spectra.items()
    }


@every_rule
def test_a_layer_cut_before_never_grows_beyond_what_it_still_has(rule):
    shapes = {"a": (12, 12), "b": (12, 12)}
    whole = {
        "a": spectrum_of((12, 12), np.linspace(2, 1, 12)),
        "b": spectrum_of((12, 12), np.linspace(1, 0.1, 12)),
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
    thin = {"a": spectrum_of((12, 12), [1.0])}
    assert plan_for_budget(shapes, thin, rule, 0.9, min_rank=3).ranks == {"a": 1}


def test_a_layer_with_fewer_components_than_the_least_rank_leaves_the_rest_to_others():
    shapes = {"thin": (12, 12), "whole": (12, 12)}
    spectra = {
        "thin": spectrum_of((12, 12), [1.0]),
        "whole": spectrum_of((12, 12), np.linspace(1, 0.1, 12)),
    }
    plan = plan_for_budget(shapes, spectra, "relative", (1 + 4) * 24 / 288, min_rank=2)
    assert plan.ranks == {"thin": 1, "whole": 4}


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
