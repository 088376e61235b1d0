"""Plans by predicted rise of the loss, against brute force over all ranks."""

import itertools

import numpy as np
import pytest

from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import ConfigError
from hf_lowrank.ranks.rules import RULES
from hf_lowrank.ranks.threshold import plan_for_budget, plan_for_threshold, predicted_rise
from tests.ranks import SHAPES, SPECTRA, dense_cost, priced_spectrum, random_instance


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


def test_the_price_of_a_jump_to_dense_is_that_of_all_components_it_restores():
    """A flat spectrum is better kept whole than cut where each of its components is cheap."""
    shapes = {"flat": (6, 6), "steep": (6, 6)}
    spectra = {
        "flat": priced_spectrum((6, 6), np.sqrt([1.0] * 6), scale=1.0),
        "steep": priced_spectrum((6, 6), np.sqrt([3.0, 1.5, 0.0, 0.0, 0.0, 0.0]), scale=1.0),
    }
    plan = plan_for_budget(shapes, spectra, "price", (12 + 36) / 72)
    assert plan.ranks == {"flat": None, "steep": 1}
    assert predicted_rise(spectra, plan) == pytest.approx(1.5)
    # With one component less it is the steep layer's turn, and what is left goes to the flat one.
    plan = plan_for_budget(shapes, spectra, "price", (12 + 35) / 72)
    assert plan.ranks == {"flat": 1, "steep": 2}


def test_predicted_rise_adds_up_over_layers():
    plan = plan_for_threshold(SHAPES, SPECTRA, "relative", 0.5)
    assert plan.ranks == {"wide": 2, "square": 3}
    wide, square = 0.01 * (1 + 0.25), 0.01 * (4 + 1 + 0.25 + 0.04 + 0.01)
    assert predicted_rise(SPECTRA, plan) == pytest.approx(wide + square)


def test_prices_need_a_metric_that_has_them():
    plain = {
        name: Spectrum(spectrum.shape, spectrum.sigma, None) for name, spectrum in SPECTRA.items()
    }
    with pytest.raises(ConfigError, match=r"^rule 'price' needs metric 'kfac'"):
        plan_for_budget(SHAPES, plain, "price", 0.8)
    with pytest.raises(ConfigError, match=r"^rule 'price' needs metric 'kfac'"):
        plan_for_threshold(SHAPES, plain, "price", 0.1)
    assert np.isnan(predicted_rise(plain, plan_for_budget(SHAPES, plain, "energy", 0.8)))
