"""Channels with a price: what a feed-forward loses with fewer channels, in the `kfac` metric.

Removing channels of `y = W_out h` and rebuilding them from those kept, `h ~ T h_S`, changes the
weight by `D = W_out (T I_S - I)`, and the loss by `tr(G D C D^T)` times the price scale, as a
truncation does (docs/methods.md, section 1), with C the channels' second moment. A channel costs a
row of each layer into it and a column of the layer out of it; a rank of the three low-rank layers
in its place costs more. So both kinds of cuts compete for one budget in the same currency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import ConfigError
from hf_lowrank.modeling_lowrank import break_even_rank
from hf_lowrank.ranks.plan import layer_cost
from hf_lowrank.ranks.threshold import tail_sums

_ROUNDS = 48
_JITTER = 1e-6
_BISECTIONS = 80


@dataclass(frozen=True)
class Curve:
    """Ways to shrink one thing.

    Attributes:
        costs: Parameters left, shape (steps,), fp64.
        rises: Predicted rise of the mean loss, nats, shape (steps,), fp64.
    """

    costs: torch.Tensor
    rises: torch.Tensor

    def best(self, price: float) -> tuple[float, int]:
        """The smallest `rise + price * cost`, and where it is."""
        totals = self.rises + price * self.costs
        place = int(totals.argmin())
        return float(totals[place]), place


# A part of a model can be shrunk in one of several ways, each of several curves on their own.
Part = Sequence[Sequence[Curve]]


def rank_curve(spectrum: Spectrum) -> Curve:
    """Ranks 1, 2, ... below break-even, and dense as the last step.

    Args:
        spectrum: With prices.
    """
    assert spectrum.price is not None  # only the kfac metric gets here
    last = min(break_even_rank(*spectrum.shape) - 1, len(spectrum.price))
    ranks = range(1, last + 1)
    costs = [layer_cost(spectrum.shape, rank) for rank in ranks]
    rises = tail_sums(spectrum.price)[1 : last + 1].tolist()
    dense = layer_cost(spectrum.shape, None)
    return Curve(*(torch.tensor(v, dtype=torch.float64) for v in ([*costs, dense], [*rises, 0.0])))


@dataclass(frozen=True)
class ChannelOrder:
    """A feed-forward's channels, those to keep first.

    Attributes:
        order: Indices, shape (n,).
        counts: How many are kept at each step, ascending to n.
        curve: Parameters and rise at each step.
    """

    order: torch.Tensor
    counts: list[int]
    curve: Curve


def channel_order(moment: torch.Tensor, worth: torch.Tensor, cost: int) -> ChannelOrder:
    """All channels, those first that rebuild most of what the others are worth.

    Greedy, a 48th of the channels at a time: with `R` what is left of C after the channels chosen
    so far have explained their share (its Schur complement), a channel j would take
    `R_j^T M R_j / R_jj` off the error `tr(M R)`.

    Args:
        moment: C, shape (n, n), damped.
        worth: `M = W_out^T G W_out`, shape (n, n), in nats: G damped and times the price scale.
        cost: Parameters of a channel.
    """
    left, weighted = moment.float(), (worth.double() @ moment.double()).float()
    size = len(left)
    free = torch.ones(size, dtype=torch.bool, device=left.device)
    order: list[int] = []
    counts: list[int] = []
    rises: list[float] = []
    while len(order) < size:
        gains = (left * weighted).sum(dim=0) / left.diagonal().clamp_min(1e-30)
        gains[~free] = -math.inf
        chosen = gains.topk(min(math.ceil(size / _ROUNDS), size - len(order))).indices
        order += chosen.tolist()
        free[chosen] = False
        core = left[chosen][:, chosen].double()
        core.diagonal().add_(_JITTER * core.diagonal().mean())
        explained = torch.linalg.solve(core, left[chosen].double()).float()
        weighted = weighted - weighted[:, chosen] @ explained
        left = left - left[:, chosen] @ explained
        counts.append(len(order))
        rises.append(max(0.0, float(weighted.diagonal().double().sum())))
    rises[-1] = 0.0  # all channels: nothing is lost but rounding
    costs = cost * torch.tensor(counts, dtype=torch.float64)
    curve = Curve(costs, torch.tensor(rises, dtype=torch.float64))
    return ChannelOrder(torch.tensor(order, device=left.device), counts, curve)


def cheapest(parts: Sequence[Part], budget: int) -> list[tuple[int, list[int]]]:
    """For each part its way and the steps of that way's curves, the best within a budget.

    Bisection of one price per parameter (a Lagrange multiplier): at the price, each part takes what
    has the smallest rise plus price times parameters. The best choice of its size; what is left
    of the budget is less than the next step.

    Raises:
        ConfigError: Even the smallest steps exceed the budget.
    """
    smallest = sum(min(sum(int(c.costs.min()) for c in way) for way in part) for part in parts)
    if smallest > budget:
        raise ConfigError(
            f"The budget is {budget} parameters, but the smallest channels and ranks need "
            f"{smallest}; raise param_ratio."
        )
    low, high = 1e-30, 1e6  # nats per parameter; the higher, the smaller the model
    choice = _at_price(parts, high)
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        found = _at_price(parts, middle)
        if _cost(parts, found) <= budget:
            high, choice = middle, found
        else:
            low = middle
    return choice


def _at_price(parts: Sequence[Part], price: float) -> list[tuple[int, list[int]]]:
    choice = []
    for part in parts:
        ways = [[curve.best(price) for curve in way] for way in part]
        totals = [sum(total for total, _ in way) for way in ways]
        best = totals.index(min(totals))
        choice.append((best, [place for _, place in ways[best]]))
    return choice


def _cost(parts: Sequence[Part], choice: Sequence[tuple[int, list[int]]]) -> float:
    return sum(
        float(curve.costs[place])
        for part, (way, places) in zip(parts, choice, strict=True)
        for curve, place in zip(part[way], places, strict=True)
    )
