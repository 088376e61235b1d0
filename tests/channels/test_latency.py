"""Ranks and channels from a budget of time: what does not pay in time stays as it is."""

import pytest
import torch

from hf_lowrank.channels.latency import plan_for_latency
from hf_lowrank.channels.order import ChannelOrder
from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import ConfigError
from hf_lowrank.format.feed_forward import FeedForward
from hf_lowrank.ranks.plan import layer_cost
from hf_lowrank.ranks.threshold import plan_for_budget

SHAPES = {"small": (8, 8), "large": (64, 48), "up": (64, 32), "down": (32, 64)}
DENSE = sum(rows * columns for rows, columns in SHAPES.values())


def spectrum(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.rand(min(shape), generator=generator, dtype=torch.float64)
    sigma = sigma.sort(descending=True).values
    return Spectrum(shape, sigma, sigma**2)


SPECTRA = {name: spectrum(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
CHEAP = SPECTRA | {"small": Spectrum((8, 8), *(torch.full((8,), 1e-4).double(),) * 2)}


def by_numbers(shape, rank):
    return layer_cost(shape, rank, "compact") / DENSE


def total(plan, times):
    left = {**plan.shapes, **plan.narrowed}
    return sum(times(left[name], rank) for name, rank in plan.ranks.items())


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_with_times_by_numbers_it_is_the_plan_of_that_many_but_for_the_rest_of_the_budget(share):
    plan = plan_for_latency(SHAPES, SPECTRA, {}, share, by_numbers, form="compact")
    other = plan_for_budget(SHAPES, SPECTRA, "price", share, form="compact")
    assert total(plan, by_numbers) <= share + 1e-9
    for name, rank in plan.ranks.items():
        assert (rank or min(SHAPES[name])) <= (other.ranks[name] or min(SHAPES[name])) + 1
    assert total(plan, by_numbers) > share - 0.06


def test_layers_that_no_rank_makes_faster_stay_dense():
    def times(shape, rank):
        if shape == SHAPES["small"] and rank is not None:
            return 2 * by_numbers(shape, None)
        return by_numbers(shape, rank)

    assert plan_for_latency(SHAPES, CHEAP, {}, 0.5, by_numbers, form="compact").ranks["small"]
    plan = plan_for_latency(SHAPES, CHEAP, {}, 0.5, times, form="compact")
    assert plan.ranks["small"] is None
    assert total(plan, times) <= 0.5 + 1e-9


def test_a_feed_forward_is_narrowed_where_ranks_cost_a_second_call():
    def times(shape, rank):
        return by_numbers(shape, rank) + 0.02 * (1 if rank is None else 2)

    counts = [16, 32, 48, 64]
    rises = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
    block = FeedForward(("up",), "down")
    order = ChannelOrder(block, torch.arange(64), counts, rises, torch.empty(0))
    fast = plan_for_latency(SHAPES, SPECTRA, {"down": order}, 0.7, times, form="compact")
    assert fast.narrowed["down"][1] == fast.narrowed["up"][0] < 64
    assert fast.ranks["up"] is None
    assert fast.ranks["down"] is None
    assert total(fast, times) <= 0.7 + 1e-9


def test_ranks_decided_beforehand_stay_and_are_paid_for():
    plan = plan_for_latency(
        SHAPES, SPECTRA, {}, 0.6, by_numbers, fixed={"large": 5}, form="compact"
    )
    assert plan.ranks["large"] == 5
    assert total(plan, by_numbers) <= 0.6 + 1e-9


def test_the_whole_time_leaves_all_dense():
    plan = plan_for_latency(SHAPES, SPECTRA, {}, 1.0, by_numbers, form="compact")
    assert set(plan.ranks.values()) == {None}
    assert not plan.narrowed


def test_too_little_time_is_refused():
    with pytest.raises(ConfigError, match=r"but the smallest channels and ranks need .* raise"):
        plan_for_latency(SHAPES, SPECTRA, {}, 0.001, by_numbers, form="compact")
