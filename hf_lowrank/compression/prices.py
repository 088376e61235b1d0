"""Prices corrected by measurement: how far the model departs when a part of it is cut alone.

Prices are second-order predictions, and they miss by factors that whole parts of a model have in
common: on language models late feed-forwards cost more than predicted. So the plan that the prices
propose is tried part by part on a few held-out windows, and all prices of a part are multiplied by
its measured divergence over its predicted rise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from torch import nn

from hf_lowrank.compression.analysis import Analysis
from hf_lowrank.compression.held_out import HeldOutDivergence
from hf_lowrank.errors import ConfigError, DataError, NumericalError
from hf_lowrank.format.feed_forward import named_feed_forwards
from hf_lowrank.format.fused_experts import experts_shape
from hf_lowrank.measuring.causal import check_distillable
from hf_lowrank.measuring.items import Batch, is_causal_lm
from hf_lowrank.measuring.progress import track
from hf_lowrank.modeling.surgery import factorized
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.report.layers import block_number
from hf_lowrank.report.sections import MeasuredPart

WINDOWS = 8
DEPTHS = 10
_LARGEST = 20.0  # factor


def check_measurable(model: nn.Module, held_out: Sequence[Batch]) -> None:
    """Refuses models whose divergence can't be measured.

    Raises:
        ConfigError: The model is no causal language model, or its logits are not made of its last
            hidden states by the head, position by position.
        DataError: There is no held-out text.
    """
    if not is_causal_lm(model):
        raise ConfigError(
            f"measured_prices compares next-token distributions; {type(model).__name__} is no "
            "causal language model."
        )
    if not held_out:
        raise DataError("measured_prices needs held-out text; pass held_out.")
    check_distillable(model, held_out[0])


def measure_parts(
    model: nn.Module,
    analysis: Analysis,
    plan: RankPlan,
    batches: Sequence[Batch],
    progress: bool = True,
) -> list[MeasuredPart]:
    """Cuts each part of the model alone, as a plan says, and measures what that does.

    Args:
        model: The dense causal language model; it is dense again afterwards.
        analysis: Its spectra and channels.
        plan: What the prices propose.
        batches: Held-out text; its first 8 windows are used.
        progress: Whether to show progress.

    Returns:
        The parts that are cut; a factor is at most 20 either way.

    Raises:
        NumericalError: A divergence is not a number.
    """
    divergence = HeldOutDivergence(model, batches, WINDOWS)
    found = []
    parts = model_parts(model, [*plan.ranks, *plan.experts])
    for layers in track(parts, "measure prices" if progress else None, "parts"):
        alone = RankPlan(
            {name: rank if name in layers else None for name, rank in plan.ranks.items()},
            plan.shapes,
            {name: shape for name, shape in plan.narrowed.items() if name in layers},
            plan.form,
            {name: each for name, each in plan.experts.items() if name in layers},
        )
        predicted = analysis.predicted_rise(alone)
        if not predicted > 0:
            continue
        with factorized(model, analysis.factors, alone, analysis.orders):
            measured = divergence.mean()
        if measured != measured:
            raise NumericalError(f"{layers[0]}: its cut makes the model's output NaN.")
        factor = min(max(measured / predicted, 1 / _LARGEST), _LARGEST)
        found.append(MeasuredPart(tuple(layers), predicted, measured, factor))
    return found


def scaled_prices(analysis: Analysis, found: Iterable[MeasuredPart]) -> Analysis:
    """The analysis with the prices of each part multiplied by the part's factor."""
    factors = {name: part.factor for part in found for name in part.layers}
    spectra = {
        name: spectrum
        if spectrum.price is None
        else dataclasses.replace(spectrum, price=spectrum.price * factors.get(name, 1.0))
        for name, spectrum in analysis.spectra.items()
    }
    orders = {name: order.scaled(factors.get(name, 1.0)) for name, order in analysis.orders.items()}
    return dataclasses.replace(analysis, spectra=spectra, orders=orders)


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
