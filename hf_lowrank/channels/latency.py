"""Ranks and channels from a budget of time, by their prices and what each shape takes to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hf_lowrank.channels.budget import cheapest, layer_parts, smallest_cost
from hf_lowrank.channels.expert_order import Orders
from hf_lowrank.channels.order import ChannelOrder
from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.threshold import Shapes

_PARTS = 1e6  # a budget of about as many units as a model has parameters


def plan_for_latency(
    shapes: Shapes,
    spectra: Mapping[str, Spectrum],
    orders: Orders,
    share: float,
    times: Callable[[tuple[int, int], int | None], float],
    *,
    min_rank: int = 1,
    fixed: Mapping[str, int | None] | None = None,
    form: str = "factors",
) -> RankPlan:
    """The plan of the smallest predicted loss that takes at most a share of the dense time.

    A layer that would be no faster at any rank that the prices favour stays dense.

    Args:
        shapes: (out_features, in_features) of every targeted layer.
        spectra: With prices, of every layer that is not in `fixed`.
        orders: Channel order of each feed-forward, keyed by its output layer.
        share: Time of the targeted layers over that of the dense ones, in (0, 1].
        times: Time of a layer of some shape at a rank, None for dense, as a share of that of all
            dense layers together.
        min_rank: Smallest rank of a factorized layer.
        fixed: Ranks decided beforehand. A feed-forward with a layer among them keeps its channels.
        form: Stored form of the layers with a rank.

    Raises:
        ConfigError: Even the smallest ranks take longer.
    """
    fixed = dict(fixed or {})

    def cost(shape: tuple[int, int], rank: int | None, form: str) -> float:
        return _PARTS * times(shape, rank)

    alone, free, parts = layer_parts(
        shapes, spectra, orders, fixed, min_rank=min_rank, form=form, cost=cost
    )
    spent = sum(cost(shapes[name], rank, form) for name, rank in fixed.items())
    choice = cheapest(parts, _PARTS * share * (1 + 1e-9) - spent)
    ranks: dict[str, int | None] = dict(fixed)
    narrowed: dict[str, tuple[int, int]] = {}
    groups: list[tuple[list[str], ChannelOrder | None]] = [([name], None) for name in alone]
    groups += [(list(each.block.names), each) for each in free]
    for (names, order), (way, places), part in zip(groups, choice, parts, strict=True):
        if order is not None and way == 1:
            left = order.shapes(shapes, order.counts[places[0]])
            ranks |= dict.fromkeys(left)
            narrowed |= {name: left[name] for name in left if left[name] != tuple(shapes[name])}
            continue
        for name, place, curve in zip(names, places, part[0], strict=True):
            is_dense = place == len(curve.costs) - 1
            ranks[name] = None if is_dense else min_rank + place
    return RankPlan({name: ranks[name] for name in shapes}, dict(shapes), narrowed, form)


def smallest_time(
    shapes: Shapes,
    spectra: Mapping[str, Spectrum],
    orders: Orders,
    times: Callable[[tuple[int, int], int | None], float],
    *,
    min_rank: int,
    fixed: Mapping[str, int | None],
    form: str,
) -> float:
    """The smallest share that `plan_for_latency` accepts; arguments as there."""

    def cost(shape: tuple[int, int], rank: int | None, form: str) -> float:
        return times(shape, rank)

    _, _, parts = layer_parts(
        shapes, spectra, orders, fixed, min_rank=min_rank, form=form, cost=cost
    )
    return smallest_cost(parts) + sum(times(shapes[name], rank) for name, rank in fixed.items())
