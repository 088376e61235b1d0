"""Channels by price: the order in which they are kept, and what is lost without the others."""

import pytest
import torch
from torch import nn

from hf_lowrank.channels.narrowing import ChannelWeights, refit
from hf_lowrank.channels.order import channel_order, order_channels
from hf_lowrank.decomposition.metrics import QuadraticForm, Side
from hf_lowrank.decomposition.moments import SecondMoment
from hf_lowrank.errors import NumericalError
from hf_lowrank.format.feed_forward import FeedForward


def positive(size, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, rank or 2 * size, generator=generator, dtype=torch.float64)
    return root @ root.T / root.shape[1] + 1e-3 * torch.eye(size, dtype=torch.float64)


def error_without(moment, worth, kept):
    """`tr(M D C D^T)` with `D` the rebuilt less the true channels, by its definition."""
    change = -torch.eye(len(moment), dtype=torch.float64)
    change[:, kept] += way_back(moment, kept)
    return float((worth @ change @ moment @ change.T).trace())


def way_back(moment, kept):
    """The best linear map from the kept channels to all, as an output weight of ones."""
    identity = torch.eye(len(moment), dtype=torch.float64)
    return refit(kept, ChannelWeights((), (), identity), moment).output


def test_rises_are_those_of_the_channels_that_are_left():
    moment, worth = positive(96, 0), positive(96, 1, rank=8)
    order, counts, rises = channel_order(moment, worth @ moment)
    assert sorted(order.tolist()) == list(range(96))
    assert counts == list(range(2, 97, 2))
    for count, rise in zip(counts[:-1:6], rises[:-1:6], strict=True):
        kept = order[:count].sort().values
        assert float(rise) == pytest.approx(error_without(moment, worth, kept), rel=1e-3)
    assert float(rises[-1]) == 0.0
    assert (rises.diff() <= 1e-6).all()


def test_order_is_better_than_chance():
    moment, worth = positive(48, 2, rank=12), positive(48, 3, rank=6)
    kept = channel_order(moment, worth @ moment)[0][:8].sort().values
    chosen = error_without(moment, worth, kept)
    generator = torch.Generator().manual_seed(0)
    others = [
        error_without(moment, worth, torch.randperm(48, generator=generator)[:8].sort().values)
        for _ in range(30)
    ]
    assert chosen < min(others)


def test_a_channel_that_nothing_reads_is_kept_last():
    moment, worth = positive(10, 4), positive(10, 5)
    worth[3] = worth[:, 3] = 0.0
    moment[3] = moment[:, 3] = 0.0
    moment[3, 3] = 50.0  # large, and no other channel says anything about it
    assert channel_order(moment, worth @ moment)[0][-1] == 3


def moment_of(vectors):
    second = vectors.T @ vectors
    return SecondMoment(second.float(), float(second.trace()), len(second))


@pytest.mark.parametrize("seed", range(3))
def test_the_refit_is_damped_more_than_the_price_for_few_tokens(seed):
    """160 noisy channels on 200 tokens: on other tokens the price's own damping does worse."""
    generator = torch.Generator().manual_seed(seed)

    def channels(count):
        hidden = torch.randn(count, 12, generator=generator) @ mixing
        return (hidden + torch.randn(count, 160, generator=generator)).double()

    mixing = torch.randn(12, 160, generator=generator)
    model = nn.ModuleDict({"up": nn.Linear(12, 160), "down": nn.Linear(160, 24)})
    nn.init.normal_(model["down"].weight, std=0.1, generator=generator)
    block = FeedForward(("up",), "down")
    seen, unseen = channels(200), channels(2000)
    whole = moment_of(seen)
    gradients = moment_of(torch.randn(200, 24, generator=generator).double())
    form = QuadraticForm(Side(None, gradients, 0.1), Side(None, whole, 0.01), 1e-4)
    order = order_channels(model, block, whole, form)
    weight = model["down"].weight.detach().double()

    def unseen_error(narrowing):
        kept = narrowing.gather[0]
        return float((unseen[:, kept] @ narrowing.output.T - unseen @ weight.T).square().mean())

    found = unseen_error(order.narrowing(model, 100))
    kept = order.order[:100].sort().values
    weights = ChannelWeights((), (), weight)
    as_priced = whole.matrix.double()
    as_priced.diagonal().add_(0.01 * whole.mean_diagonal)
    as_the_price = refit(kept, weights, as_priced)
    error = float((unseen[:, kept] @ as_the_price.output.T - unseen @ weight.T).square().mean())
    assert found < 0.95 * error


def test_channels_that_depend_on_each_other_are_explained_all_the_same():
    """The three that are chosen at once make a singular matrix: a negative channel among them."""
    moment = torch.eye(4, dtype=torch.float64)
    moment[:2, :2], moment[2, 2] = 1.0, -2.0  # mean 0, so there is no jitter
    moment[0, 3] = moment[3, 0] = moment[1, 3] = moment[3, 1] = 0.5
    weighted = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0], dtype=torch.float64)) @ moment
    order, counts, rises = channel_order(moment, weighted, multiple=3)
    assert (order[3:].tolist(), counts) == ([3], [3, 4])
    assert bool(rises.isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_refused_by_the_refit(bad):
    moment = positive(6, 0)
    moment[1, 1] = bad
    with pytest.raises(NumericalError, match="the second moment holds NaN or infinity"):
        way_back(moment, torch.tensor([0, 1, 2]))


def test_weighted_moments_that_are_not_finite_are_refused():
    weighted = positive(6, 1)
    weighted[2, 2] = float("nan")
    with pytest.raises(NumericalError, match="the second moment holds NaN or infinity"):
        channel_order(positive(6, 0), weighted)


def test_prices_that_overflow_are_refused():
    ones = torch.ones(96, 96, dtype=torch.float64)
    with pytest.raises(NumericalError, match="the price of a channel is NaN or infinite"):
        channel_order(2 * ones - torch.eye(96), 3e38 * ones)
