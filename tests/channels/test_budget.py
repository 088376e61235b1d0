"""Channels and ranks from one budget, by their price."""

import itertools

import pytest
import torch

from hf_lowrank.channels.budget import Curve, cheapest, rank_curve
from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import ConfigError
from hf_lowrank.ranks.hull import lower_hull


def test_rank_curve_ends_dense():
    sigma = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    spectrum = Spectrum((8, 4), sigma, sigma**2)
    curve = rank_curve(spectrum)  # rank 3 would cost more than dense
    assert curve.costs.tolist() == [12.0, 24.0, 32.0]
    assert curve.rises.tolist() == [5.25, 1.25, 0.0]


def convex(generator, steps):
    costs = torch.rand(steps, generator=generator, dtype=torch.float64).cumsum(0) * 10 + 1
    falls = torch.rand(steps, generator=generator, dtype=torch.float64).sort(descending=True).values
    slopes = falls[1:] * costs.diff()
    rises = torch.cat([slopes.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    return Curve(costs.floor().clamp_min(1), rises)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_its_size(seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [
        [[convex(generator, 4)]],
        [[convex(generator, 3), convex(generator, 3)], [convex(generator, 4)]],
        [[convex(generator, 5)]],
    ]
    options = []
    for part in parts:
        ways = []
        for index, way in enumerate(part):
            for places in itertools.product(*(range(len(curve.costs)) for curve in way)):
                pairs = list(zip(way, places, strict=True))
                cost = sum(float(curve.costs[place]) for curve, place in pairs)
                rise = sum(float(curve.rises[place]) for curve, place in pairs)
                ways.append((cost, rise, (index, list(places))))
        options.append(ways)
    every = [
        (sum(o[0] for o in one), sum(o[1] for o in one), [o[2] for o in one])
        for one in itertools.product(*options)
    ]
    smallest, largest = min(e[0] for e in every), max(e[0] for e in every)
    best = {cost: min(e[1] for e in every if e[0] == cost) for cost, _, _ in every}
    corners = lower_hull([(cost, best[cost], None) for cost in sorted(best)])
    for share in (0.2, 0.5, 0.8):
        budget = int(smallest + share * (largest - smallest)) + 1
        choice = cheapest(parts, budget)
        cost, rise, _ = next(each for each in every if each[2] == choice)
        expected = [corner for corner in corners if corner[0] <= budget][-1]
        assert (cost, rise) == pytest.approx(expected[:2])  # nothing that still fits is left out


def test_a_budget_below_the_smallest_steps_is_refused():
    curve = Curve(torch.tensor([5.0, 9.0]), torch.tensor([1.0, 0.0]))
    with pytest.raises(ConfigError, match=r"^The budget is 9, .* need 10; raise"):
        cheapest([[[curve]], [[curve]]], 9)
