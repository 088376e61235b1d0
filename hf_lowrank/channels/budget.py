"""Ranks and channels from one budget, by their prices.

A channel costs a row of each layer into it and a column of the output layer; a rank of the
low-rank layers in its place costs more. Both kinds of cuts have a predicted rise of the loss, so
they compete for one budget in the same currency.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_lowrank.channels.expert_order import ExpertOrder, Orders, of_experts, of_feed_forwards
from hf_lowrank.channels.order import ChannelOrder
from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import ConfigError
from hf_lowrank.ranks.hull import tail_sums
from hf_lowrank.ranks.plan import RankPlan, break_even_rank, layer_cost
from hf_lowrank.ranks.threshold import Shapes, plan_for_budget, predicted_rise

_BISECTIONS = 80
# What a layer of some shape costs at a rank, None for dense, in a stored form.
Cost = Callable[[tuple[int, int], int | None, str], float]


@dataclass(frozen=True)
class Curve:
    """Ways to shrink one thing.

    Attributes:
        costs: Parameters left, or another cost, shape (steps,), fp64.
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


def plan_with_channels(
    shapes: Shapes,
    spectra: Mapping[str, Spectrum],
    orders: Orders,
    param_ratio: float,
    *,
    min_rank: int = 1,
    fixed: Mapping[str, int | None] | None = None,
    form: str = "factors",
) -> RankPlan:
    """The plan of the smallest predicted loss within a budget, channels included.

    Args:
        shapes: (out_features, in_features) of every targeted layer.
        spectra: With prices, of every layer that is not in `fixed`.
        orders: Channel order of each feed-forward, keyed by its output layer, and order of each
            layer's fused experts by their name.
        param_ratio: Kept / dense parameters over all targeted layers and experts, in (0, 1].
        min_rank: Smallest rank of a factorized layer.
        fixed: Ranks decided beforehand. A feed-forward with a layer among them keeps its channels.
        form: Stored form of the layers with a rank.

    Raises:
        ConfigError: Even the smallest ranks exceed the budget.
    """
    fixed = dict(fixed or {})
    limits: dict[str, Any] = {"min_rank": min_rank, "form": form}
    experts = of_experts(orders)
    whole = {name: each.plan(*each.dense) for name, each in experts.items()}
    if param_ratio >= 1:  # nothing has to be cut, so keep every channel, even a worthless one
        plan = plan_for_budget(shapes, spectra, "price", 1.0, fixed=fixed, **limits)
        return dataclasses.replace(plan, experts=whole)
    dense = sum(layer_cost(shape, None) for shape in shapes.values())
    dense += sum(each.dense_parameters for each in whole.values())
    budget = int(param_ratio * dense + 1e-6)
    spent = sum(layer_cost(shapes[name], rank, form) for name, rank in fixed.items())
    alone, free, parts = layer_parts(shapes, spectra, orders, fixed, **limits)
    others = len(alone)
    parts += [[[experts_curve(each)]] for each in experts.values()]
    choice = cheapest(parts, budget - spent)
    small: dict[str, tuple[int, int]] = {}
    chosen = choice[others + len(free) :]
    left_of = {
        name: each.plan(*each.sizes[places[0]])
        for (name, each), (_, places) in zip(experts.items(), chosen, strict=True)
    }
    for each, (way, places) in zip(free, choice[others : others + len(free)], strict=True):
        if way == 1:
            small |= each.shapes(shapes, each.counts[places[0]])
    # With the channels decided, the rule that has no channels spends the rest on ranks.
    left = {**shapes, **small}
    total = sum(layer_cost(shape, None) for shape in left.values())
    budget -= sum(each.kept_parameters for each in left_of.values())
    decided = fixed | dict.fromkeys(small)
    plan = plan_for_budget(left, spectra, "price", budget / total, fixed=decided, **limits)
    shrunk = {name: shape for name, shape in small.items() if shape != tuple(shapes[name])}
    return RankPlan(plan.ranks, dict(shapes), shrunk, form, left_of)


def layer_parts(
    shapes: Shapes,
    spectra: Mapping[str, Spectrum],
    orders: Orders,
    fixed: Mapping[str, int | None],
    *,
    min_rank: int = 1,
    form: str = "factors",
    cost: Cost = layer_cost,
) -> tuple[list[str], list[ChannelOrder], list[Part]]:
    """The parts of a model that can be shrunk: layers alone, then whole feed-forwards.

    Returns:
        The names of the former, the orders of the latter, and the parts in this order.
    """
    free = [
        each
        for each in of_feed_forwards(orders).values()
        if all(name in spectra and name not in fixed for name in each.block.names)
    ]
    inside = {name for each in free for name in each.block.names}
    ranks = {n: rank_curve(s, min_rank, form, cost) for n, s in spectra.items() if n not in fixed}
    alone = [name for name in ranks if name not in inside]
    parts: list[Part] = [[[ranks[name]]] for name in alone]
    for each in free:
        channels = channel_curve(each, shapes, cost)
        parts.append([[ranks[name] for name in each.block.names], [channels]])
    return alone, free, parts


def predicted_rise_with_channels(
    spectra: Mapping[str, Spectrum], orders: Orders, plan: RankPlan
) -> float:
    """Predicted rise of the mean loss, nats: of the dropped components and channels together."""
    channels = sum(
        order.predicted_rise(plan.narrowed[name][1])
        for name, order in of_feed_forwards(orders).items()
        if name in plan.narrowed
    )
    experts = sum(
        order.predicted_rise(plan.experts[name])
        for name, order in of_experts(orders).items()
        if name in plan.experts
    )
    return predicted_rise(spectra, plan) + channels + experts


def rank_curve(
    spectrum: Spectrum, min_rank: int = 1, form: str = "factors", cost: Cost = layer_cost
) -> Curve:
    """Ranks from the smallest to break-even, and dense as the last step.

    Args:
        spectrum: With prices.
        min_rank: The smallest rank.
        form: Stored form of the layer with a rank.
        cost: What counts.
    """
    assert spectrum.price is not None  # only the kfac metric gets here
    last = min(break_even_rank(*spectrum.shape, form) - 1, len(spectrum.price))
    ranks = range(min_rank, last + 1)
    costs = [cost(spectrum.shape, rank, form) for rank in ranks]
    rises = tail_sums(spectrum.price)[min_rank : last + 1].tolist()
    dense = cost(spectrum.shape, None, form)
    return Curve(*(torch.tensor(v, dtype=torch.float64) for v in ([*costs, dense], [*rises, 0.0])))


def channel_curve(order: ChannelOrder, shapes: Shapes, cost: Cost = layer_cost) -> Curve:
    """Cost and rise at each step of a feed-forward's channels."""
    costs = [
        sum(cost(shape, None, "") for shape in order.shapes(shapes, count).values())
        for count in order.counts
    ]
    return Curve(torch.tensor(costs, dtype=torch.float64), order.rises)


def experts_curve(order: ExpertOrder) -> Curve:
    """Parameters and rise of every way to shrink a layer's experts."""
    costs = [order.plan(*size).kept_parameters for size in order.sizes]
    return Curve(torch.tensor(costs, dtype=torch.float64), order.rises)


def cheapest(parts: Sequence[Part], budget: float) -> list[tuple[int, list[int]]]:
    """For each part its way and the steps of that way's curves, the best within a budget.

    Bisection of one price per parameter (a Lagrange multiplier): at the price, each part takes what
    has the smallest rise plus price times parameters. The best choice of its size; what is left
    of the budget is less than the next step.

    Raises:
        ConfigError: Even the smallest steps exceed the budget.
    """
    smallest = smallest_cost(parts)
    if smallest > budget:
        raise ConfigError(
            f"The budget is {budget:.6g}, but the smallest channels and ranks need "
            f"{smallest:.6g}; raise param_ratio."
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


def smallest_cost(parts: Sequence[Part]) -> float:
    """What the cheapest step of every part costs together."""
    return sum(min(sum(float(c.costs.min()) for c in way) for way in part) for part in parts)


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
