"""Ranks, channels and the bits of every matrix, chosen together for a file of a size.

Each way to store a layer, or a feed-forward that loses channels, has bytes and a predicted rise of
the loss: of what is dropped and of what is rounded. So all compete for one number of bytes.
See docs/methods.md, 8.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_lowrank.channels.budget import Curve, cheapest
from hf_lowrank.channels.expert_order import of_feed_forwards
from hf_lowrank.channels.order import ChannelOrder
from hf_lowrank.compression.analysis import Analysis
from hf_lowrank.compression.rounding_prices import BITS, Rounding
from hf_lowrank.modeling.stored_size import SizeOnDisk
from hf_lowrank.ranks.hull import tail_sums
from hf_lowrank.ranks.plan import COMPACT, RankPlan, break_even_rank

_RANKS = 64  # tried of each layer; the next one is a sixty-fourth of the layer away
_TYPES = (None, *BITS)
# Of A and B. In a compact layer an error of 4 bits costs more than the rank that it pays for.
_PAIRS = ((None, None), (8, 8), (4, 8), (4, 4))
_COMPACT_PAIRS = ((None, None), (8, 8))


@dataclass(frozen=True)
class Way:
    """One way to store a layer or a feed-forward.

    Attributes:
        rise: Predicted rise of the mean loss, nats.
        bytes: Of its matrices.
        ranks: By layer name.
        narrowed: Shapes of layers that lose channels.
        bits: By matrix, of those that are rounded.
    """

    rise: float
    bytes: int
    ranks: Mapping[str, int | None]
    bits: Mapping[str, int]
    narrowed: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Menu:
    """Ways to store one thing, and what they cost.

    Args:
        ways: All of them.
    """

    def __init__(self, ways: Sequence[Way]) -> None:
        self.ways = ways
        costs = torch.tensor([each.bytes for each in ways], dtype=torch.float64)
        rises = torch.tensor([each.rise for each in ways], dtype=torch.float64)
        self.curve = Curve(costs, rises)


def mixed_plan(
    model: nn.Module, analysis: Analysis, prices: Mapping[str, Rounding], limit: float
) -> tuple[RankPlan, dict[str, int]] | None:
    """The plan of the smallest predicted loss within a number of bytes, and the bits of matrices.

    Args:
        model: The dense model.
        analysis: Its spectra, with prices.
        prices: Of rounding its layers. One without stays as it is or takes int8, the latter for
            nothing.
        limit: Bytes of model.safetensors.

    Returns:
        None if even the smallest is larger.
    """
    size_of = SizeOnDisk(model)
    free = {
        order.block.names: order
        for order in of_feed_forwards(analysis.orders).values()
        if analysis.config.channels
        and all(name in prices and name not in analysis.fixed for name in order.block.names)
    }
    inside = {name for names in free for name in names}
    menus = {
        name: _layer_menu(name, analysis, prices.get(name), size_of) for name in analysis.shapes
    }
    parts = [[[menu]] for name, menu in menus.items() if name not in inside]
    for names, order in free.items():
        narrower = _channel_menu(order, analysis, prices, size_of)
        parts.append([[menus[name] for name in names], [narrower]])
    curves = [[[menu.curve for menu in way] for way in part] for part in parts]
    smallest = sum(min(sum(float(c.costs.min()) for c in way) for way in part) for part in curves)
    left = limit - size_of.besides(analysis.shapes)
    if smallest > left:
        return None
    chosen = [
        menu.ways[place]
        for part, (way, places) in zip(parts, cheapest(curves, int(left)), strict=True)
        for menu, place in zip(part[way], places, strict=True)
    ]
    ranks = {name: rank for each in chosen for name, rank in each.ranks.items()}
    return RankPlan(
        {name: ranks[name] for name in analysis.shapes},
        analysis.shapes,
        {name: shape for each in chosen for name, shape in each.narrowed.items()},
        analysis.config.inference_form,
    ), {name: bits for each in chosen for name, bits in each.bits.items()}


def _layer_menu(name: str, analysis: Analysis, price: Rounding | None, size_of: SizeOnDisk) -> Menu:
    """A layer dense, and at about 64 ranks, each in all types."""
    shape, form = analysis.shapes[name], analysis.config.inference_form
    spectrum, least = analysis.spectra.get(name), analysis.config.min_rank
    ranks: list[int | None] = [None]
    tails = torch.zeros(1 + min(shape), dtype=torch.float64)
    if spectrum is not None and spectrum.price is not None:
        tails = tail_sums(spectrum.price)
        useful = range(least, break_even_rank(*shape, form))
        ranks += useful[:: max(1, len(useful) // _RANKS)]
    if name in analysis.fixed:
        ranks = [analysis.fixed[name]]
    ways = []
    for rank in ranks:
        if rank is None:
            kinds = [{} if bits is None else {name: bits} for bits in _TYPES if price or bits != 4]
            rises = [price.rise(kind.get(name)) if price else 0.0 for kind in kinds]
        else:
            pairs = _COMPACT_PAIRS if form == COMPACT or price is None else _PAIRS
            kinds = [_factor_bits(name, pair) for pair in pairs]
            rises = [float(tails[rank])] * len(pairs)
            if price is not None:
                rises = [
                    t + price.low_rank_rise(rank, p, form)
                    for t, p in zip(rises, pairs, strict=True)
                ]
        for kind, rise in zip(kinds, rises, strict=True):
            num_bytes = size_of.layer(name, shape, rank, form, kind)
            ways.append(Way(rise, num_bytes, {name: rank}, kind))
    return Menu(ways)


def _factor_bits(name: str, pair: tuple[int | None, int | None]) -> dict[str, int]:
    matrices = (f"{name}.lowrank_A", f"{name}.lowrank_B")
    return {matrix: bits for matrix, bits in zip(matrices, pair, strict=True) if bits is not None}


def _channel_menu(
    order: ChannelOrder, analysis: Analysis, prices: Mapping[str, Rounding], size_of: SizeOnDisk
) -> Menu:
    """A feed-forward with fewer channels; all layers into them are of one type.

    Rounding fewer channels costs their share of what rounding all would.
    """
    block, form = order.block, analysis.config.inference_form
    ways = []
    for count, rise in zip(order.counts[:-1], order.rises.tolist(), strict=False):
        shapes, share = order.shapes(analysis.shapes, count), count / order.counts[-1]
        for types in itertools.product(_TYPES, repeat=2):
            wanted = dict.fromkeys(block.inputs, types[0]) | {block.output: types[1]}
            kinds = {name: bits for name, bits in wanted.items() if bits is not None}
            rounded = share * sum(prices[name].rise(bits) for name, bits in kinds.items())
            num_bytes = sum(size_of.layer(n, s, None, form, kinds) for n, s in shapes.items())
            ways.append(Way(rise + rounded, num_bytes, dict.fromkeys(shapes), kinds, shapes))
    return Menu(ways)
