"""Prices on held-out text: what dropping components costs where they were not chosen.

The directions that a decomposition drops are those that its calibration text uses least, so on any
other text they cost more; and a Kronecker product of moments knows nothing of what inputs and
gradients have in common. So all cuts are priced by their effects on held-out text
(measuring/effects.py), from a few backward passes whatever their number. See docs/methods.md, 2.5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_lowrank.channels.expert_order import ExpertOrder, Orders, of_experts, of_feed_forwards
from hf_lowrank.channels.order import ChannelOrder
from hf_lowrank.decomposition.spectrum import Factors, Spectrum
from hf_lowrank.errors import DataError
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.format.feed_forward import named_feed_forwards
from hf_lowrank.format.fused_experts import experts_shape
from hf_lowrank.measuring.batches import num_tokens
from hf_lowrank.measuring.distributed import ALONE, Processes
from hf_lowrank.measuring.effects import Cut, Effects, measure_effects
from hf_lowrank.measuring.items import Batch, LossFunction
from hf_lowrank.measuring.progress import Progress
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.report.layers import block_number
from hf_lowrank.report.sections import MeasuredPart

DRAWS = 2  # of labels for each batch: less noise of the draw without more text
TOKENS, ITEMS = 3072, 8  # of held-out text: a standard error over items needs several of them
DEPTHS = 10  # parts with a factor each: a factor for every layer is too noisy to choose by
_LARGEST = 20.0  # factor; one beyond rests on a few items, and would give a part all cuts or none


@dataclass(frozen=True)
class HeldOutPrices:
    """Effects of all cuts on held-out text.

    Attributes:
        ranks: By layer name; the steps are the ranks from 0 to the largest.
        channels: By the name of a feed-forward's output layer; the steps are those of its order.
        scored: Scored positions of all items, over all draws.
        draws: How many draws of labels they hold, one after another.
    """

    ranks: Mapping[str, Effects]
    channels: Mapping[str, Effects]
    scored: int
    draws: int = DRAWS

    def chosen(
        self, plan: RankPlan, orders: Mapping[str, ChannelOrder]
    ) -> dict[str, tuple[Effects, int]]:
        """Effects of what a plan cuts and the step at which it does, by layer name."""
        found = {}
        for name, rank in plan.ranks.items():
            if rank is not None and name in self.ranks:
                found[name] = (self.ranks[name], rank)
        for name, effects in self.channels.items():
            if name in plan.narrowed:
                count = plan.narrowed[name][1]
                found[name] = (effects, sum(c <= count for c in orders[name].counts) - 1)
        return found

    def joined(self, other: HeldOutPrices | None) -> HeldOutPrices:
        """These and those of other layers on the same items."""
        if other is None:
            return self
        return HeldOutPrices(
            {**other.ranks, **self.ranks},
            {**other.channels, **self.channels},
            self.scored,
            self.draws,
        )

    def rise(self, squares: torch.Tensor) -> torch.Tensor:
        """Rise of the mean loss, nats: of squared changes, summed over their first dimension."""
        return squares.double().sum(dim=0) / (2 * self.scored)


def check_prices(held_out: Sequence[Batch]) -> None:
    """Refuses to price cuts on nothing.

    Raises:
        DataError: There is no held-out text.
    """
    if not held_out:
        raise DataError("measured_prices needs held-out text; pass held_out.")


def measure_prices(
    model: nn.Module,
    factors: Mapping[str, Factors],
    orders: Orders,
    batches: Sequence[Batch],
    *,
    draws: int = DRAWS,
    loss_function: LossFunction | None = None,
    seed: int = 0,
    processes: Processes = ALONE,
    progress: bool = True,
) -> HeldOutPrices:
    """Effects of all cuts on held-out text.

    Args:
        model: The dense model.
        factors: Of all layers, by name.
        orders: Channel order of each feed-forward, keyed by its output layer; fused experts are
            not measured.
        batches: Text that the factors were not made from; see `enough`.
        draws: How many times labels are drawn for each batch.
        loss_function: Loss of the run, None for the model's own.
        seed: Seed of the drawn labels.
        processes: Those that share the work.
        progress: Whether to show progress.

    Raises:
        NumericalError: A loss is not finite.
    """
    cuts = {name: rank_cut(name, found) for name, found in factors.items()}
    blocks = of_feed_forwards(orders)
    narrow = {name: channel_cut(model, order) for name, order in blocks.items()}
    named = {f"{name}/channels": cut for name, cut in narrow.items() if cut is not None}
    with Progress("measure prices" if progress else None, draws * len(batches)) as bar:
        effects, scored = measure_effects(
            model,
            {name: model.get_submodule(name) for name in factors},
            cuts | named,
            batches,
            draws=draws,
            loss_function=loss_function,
            seed=seed,
            on_batch=lambda: bar.update(processes.count),
            processes=processes,
        )
    channels = {name: effects[f"{name}/channels"] for name in narrow if f"{name}/channels" in named}
    return HeldOutPrices({name: effects[name] for name in factors}, channels, scored, draws)


def enough(batches: Sequence[Batch]) -> list[Batch]:
    """The first batches that hold `TOKENS` tokens and `ITEMS` items, or all."""
    found: list[Batch] = []
    tokens = items = 0
    for batch in batches:
        if tokens >= TOKENS and items >= ITEMS:
            break
        found.append(batch)
        tokens += num_tokens(batch)
        items += len(next(iter(batch.values())))
    return found


def rank_cut(name: str, factors: Factors) -> Cut:
    """A layer at every rank."""
    return Cut(name, factors.left, factors.right, range(len(factors.right) + 1))


def channel_cut(model: nn.Module, order: ChannelOrder) -> Cut | None:
    """A feed-forward at every step of its channels.

    With `C = L L^T` in the order of the channels, keeping the first and rebuilding the others from
    them drops the last components of `(W_out L) (L^-1)`.

    Returns:
        None where the moment is singular.
    """
    moment = order.moment[order.order][:, order.order].double()
    root, failed = torch.linalg.cholesky_ex(moment)
    if int(failed):
        return None
    weight = linear_weight(model.get_submodule(order.block.output)).detach()
    left = weight[:, order.order.to(weight.device)].double() @ root.to(weight.device)
    inverse = torch.linalg.solve_triangular(root, torch.eye(len(root)).double(), upper=False)
    right = torch.empty_like(inverse, dtype=torch.float32)
    right[:, order.order] = inverse.float()
    return Cut(order.block.output, left.float(), right, order.counts)


@dataclass(frozen=True)
class Priced:
    """Prices from held-out text, in the form in which plans are made.

    Attributes:
        spectra: By layer name.
        orders: By the name of a feed-forward's output layer.
        coherence: By layer name, see `priced`.
        parts: How far they are off the prices of the calibration text.
    """

    spectra: dict[str, Spectrum]
    orders: dict[str, ChannelOrder | ExpertOrder]
    coherence: dict[str, float]
    parts: list[MeasuredPart]


def priced(
    spectra: Mapping[str, Spectrum],
    orders: Orders,
    found: HeldOutPrices,
    plan: RankPlan,
    parts: Iterable[Sequence[str]],
) -> Priced:
    """Spectra and orders whose prices are those of held-out text.

    A layer's curve is taken from the squares by position, which hardly vary from item to item.
    What positions have in common is one factor for each part of the model, `coherence`, at the
    cuts of a plan: over its layers c^2 varies less. Fused experts are not cut in this way; their
    prices follow the sum of the others'.

    Args:
        spectra: With the prices of the calibration text.
        orders: As they were.
        found: Effects on held-out text.
        plan: What the prices of the calibration text propose.
        parts: Names of the layers of each part.
    """
    blocks = of_feed_forwards(orders)
    chosen = found.chosen(plan, blocks)
    everywhere = _coherence(chosen.values())
    result = Priced(dict(spectra), dict(orders), {}, [])
    for layers in parts:
        cut = {name: chosen[name] for name in layers if name in chosen}
        coherence = _coherence(cut.values()) if cut else everywhere
        before = sum(_predicted(spectra, blocks, plan, name) for name in cut)
        after = sum(coherence * float(found.rise(each.squares[:, at])) for each, at in cut.values())
        if cut and before > 0:
            result.parts.append(MeasuredPart(tuple(layers), before, after, after / before))
        for name in layers:
            result.coherence[name] = coherence
            if name in found.ranks:
                rises = coherence * _falling(found.rise(found.ranks[name].squares))
                result.spectra[name] = dataclasses.replace(
                    spectra[name], price=rises[:-1] - rises[1:]
                )
            if name in found.channels:
                rises = coherence * _falling(found.rise(found.channels[name].squares))
                result.orders[name] = dataclasses.replace(blocks[name], rises=rises)
    before = sum(part.predicted for part in result.parts)
    after = sum(part.measured for part in result.parts)
    if before > 0:
        result.orders.update(
            {name: each.scaled(after / before) for name, each in of_experts(orders).items()}
        )
    return result


def _coherence(cuts: Iterable[tuple[Effects, int]]) -> float:
    """c^2 over the same squared by position, over several cuts; at most 20 either way."""
    together = apart = 0.0
    for effects, at in cuts:
        together += float(effects.items[:, at].double().square().sum())
        apart += float(effects.squares[:, at].double().sum())
    return min(max(together / apart, 1 / _LARGEST), _LARGEST) if apart > 0 else 1.0


def _falling(rises: torch.Tensor) -> torch.Tensor:
    """The same where more components never cost more: such a step is noise."""
    return rises.cummin(dim=0).values


def _predicted(
    spectra: Mapping[str, Spectrum],
    orders: Mapping[str, ChannelOrder],
    plan: RankPlan,
    name: str,
) -> float:
    if name in orders and name in plan.narrowed:
        return orders[name].predicted_rise(plan.narrowed[name][1])
    return spectra[name].predicted_rise(plan.ranks[name])


def standard_error(
    found: HeldOutPrices,
    coherence: Mapping[str, float],
    orders: Orders,
    plan: RankPlan,
) -> float:
    """Standard error of a plan's predicted rise over the held-out items, nats; NaN of one item."""
    chosen = found.chosen(plan, of_feed_forwards(orders))
    if not chosen:
        return 0.0
    total = sum(
        coherence[name] * each.squares[:, at].double() for name, (each, at) in chosen.items()
    )
    assert isinstance(total, torch.Tensor)
    by_item = total.view(found.draws, -1).mean(dim=0)
    items = len(by_item)
    spread = float(by_item.std()) if items > 1 else math.nan
    return spread * math.sqrt(items) * found.draws / (2 * found.scored)


def model_parts(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Layers in parts: tenths of the depth, feed-forwards and experts apart from the rest."""
    names = list(names)
    linear = [name for name in names if experts_shape(model.get_submodule(name)) is None]
    inside = {n for _, block in named_feed_forwards(model, linear) for n in block.names}
    inside |= {*names} - {*linear}
    blocks = max((block_number(name) for name in names), default=0) + 1
    depths = min(DEPTHS, blocks)
    parts: dict[tuple[int, bool], list[str]] = {}
    for name in names:
        place = (block_number(name) * depths // blocks, name in inside)
        parts.setdefault(place, []).append(name)
    return list(parts.values())
