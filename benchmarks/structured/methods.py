"""The structured systems, by name: new layers for a dense model at a size.

None of them edits the model: `swapped` in surgery.py puts the layers in for a while. LoRAP, SP3 and
folding narrow the feed-forwards; all other targeted layers become factors, in the metric that is
nearest to the system, and both keep the same share of their parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from benchmarks.structured.folding import folding_narrowing
from benchmarks.structured.lorap import channel_importance, kept_channels, norm_scaled
from benchmarks.structured.shared_basis import (
    neighbours,
    shared_factors,
    shared_layers,
    shared_rank,
)
from benchmarks.structured.sp3 import principal_narrowing
from hf_lowrank.channels.narrowing import Narrowing, channel_weights, narrowed, selection
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import QuadraticForm, Side
from hf_lowrank.decomposition.moments import Moments, SecondMoment
from hf_lowrank.decomposition.spectrum import decompose
from hf_lowrank.errors import ConfigError, TargetError
from hf_lowrank.format.dense_linear import linear_shape, linear_weight
from hf_lowrank.format.feed_forward import FeedForward, find_feed_forwards
from hf_lowrank.modeling.surgery import lowrank_from_factors
from hf_lowrank.ranks.threshold import plan_for_budget


@dataclass(frozen=True)
class Dense:
    """What a structured system starts from.

    Attributes:
        model: The dense model.
        targets: Its targeted layers by name.
        moments: Moments of these, `input_whole` filled; empty for a data-free system.
    """

    model: nn.Module
    targets: Mapping[str, nn.Module]
    moments: Mapping[str, Moments]

    def whole(self, name: str) -> SecondMoment:
        """Second moment of a layer's inputs themselves."""
        found = self.moments[name].input_whole
        if found is None:
            raise ValueError(f"{name}: input_whole was not collected.")
        return found


@dataclass(frozen=True)
class NewLayers:
    """Result of a structured system.

    Attributes:
        layers: Layers that take the place of dense ones, by name; the others stay.
        decompositions: Matrices decomposed: weights, stacked weights and channel moments.
    """

    layers: dict[str, nn.Module]
    decompositions: int


@dataclass(frozen=True)
class StructuredMethod:
    """A structured system.

    Attributes:
        needs: Statistics that it reads; names of `Moments` fields.
        build: From the dense model, a size and a seed to new layers.
    """

    needs: frozenset[str]
    build: Callable[[Dense, float, int], NewLayers]


def lorap(dense: Dense, param_ratio: float, seed: int = 0) -> NewLayers:
    """Weighted SVD elsewhere, channels pruned by weights and norms; see lorap.py.

    Simplified: the paper gives each attention matrix its own share by how low its rank is; here one
    threshold on the share of energy does that for all of them. No fine-tuning afterwards.
    """

    def narrow(block: FeedForward, count: int) -> Narrowing:
        weights = channel_weights(dense.model, block)
        inputs, channels = (
            dense.whole(name).matrix.diagonal() for name in (block.inputs[0], block.output)
        )
        return selection(
            kept_channels(channel_importance(weights, inputs, channels), count), weights
        )

    def form(name: str) -> QuadraticForm:
        return norm_scaled(dense.whole(name))

    return NewLayers(*_mixed(dense, param_ratio, narrow, form, "energy-share"))


def sp3(dense: Dense, param_ratio: float, seed: int = 0) -> NewLayers:
    """Principal components of channels, and of the outputs elsewhere; see sp3.py.

    Elsewhere the outputs are projected on their principal components, which is the `whitened`
    metric. Simplified: widths of feed-forwards in place of the hidden size, equal shares in place
    of learned masks, no fine-tuning.
    """

    def narrow(block: FeedForward, count: int) -> Narrowing:
        weights = channel_weights(dense.model, block)
        return principal_narrowing(weights, dense.whole(block.output), count)

    def form(name: str) -> QuadraticForm:
        return _whitened(dense.whole(name))

    layers, decomposed = _mixed(dense, param_ratio, narrow, form, "uniform")
    return NewLayers(layers, decomposed + len(find_feed_forwards(dense.model, dense.targets)))


def model_folding(
    dense: Dense, param_ratio: float, seed: int = 0, *, repair: bool = False
) -> NewLayers:
    """Channels merged by k-means, plain SVD elsewhere: no data at all; see folding.py.

    Simplified: attention is not folded; the variance is left alone, or repaired for inputs of unit
    covariance; one start of k-means.
    """

    def narrow(block: FeedForward, count: int) -> Narrowing:
        return folding_narrowing(channel_weights(dense.model, block), count, seed, repair)

    return NewLayers(*_mixed(dense, param_ratio, narrow, lambda name: QuadraticForm(), "uniform"))


def basis_sharing(dense: Dense, param_ratio: float, seed: int = 0) -> NewLayers:
    """Pairs of neighbouring layers on one basis, whitened factors elsewhere; see shared_basis.py.

    Simplified: the published code also refits coefficients to the compressed model's inputs.
    """
    groups = neighbours(list(dense.targets))
    if not groups:
        raise TargetError(
            f"{type(dense.model).__name__} has no two blocks with layers of a kind that can share "
            "a basis."
        )
    layers: dict[str, nn.Module] = {}
    for names in groups:
        group = {name: dense.targets[name] for name in names}
        factors = shared_factors(group, [dense.whole(name) for name in names])
        rank = shared_rank(linear_shape(group[names[0]]), len(group), param_ratio)
        layers |= shared_layers(group, factors, rank)
    others = [name for name in dense.targets if name not in layers]
    rest = _factorized(
        dense, others, param_ratio, lambda name: _whitened(dense.whole(name)), "uniform"
    )
    return NewLayers(layers | rest, len(groups) + len(others))


_WHOLE = frozenset({"input_whole"})
METHODS: dict[str, StructuredMethod] = {
    "lorap": StructuredMethod(_WHOLE, lorap),
    "sp3": StructuredMethod(_WHOLE, sp3),
    "model-folding": StructuredMethod(frozenset(), model_folding),
    "model-folding+repair": StructuredMethod(frozenset(), partial(model_folding, repair=True)),
    "basis-sharing": StructuredMethod(_WHOLE, basis_sharing),
}


def _mixed(
    dense: Dense,
    param_ratio: float,
    narrow: Callable[[FeedForward, int], Narrowing],
    form: Callable[[str], QuadraticForm],
    rule: str,
) -> tuple[dict[str, nn.Module], int]:
    """Narrow feed-forwards and factors for the other layers; and how many were decomposed."""
    blocks = find_feed_forwards(dense.model, dense.targets)
    layers: dict[str, nn.Module] = {}
    for block in blocks:
        channels = linear_shape(dense.targets[block.output])[1]
        narrowing = narrow(block, num_kept(channels, param_ratio))
        layers |= narrowed(dense.model, block, narrowing)
    others = [name for name in dense.targets if name not in layers]
    return layers | _factorized(dense, others, param_ratio, form, rule), len(others)


def num_kept(channels: int, param_ratio: float) -> int:
    """How many of a feed-forward's channels a size leaves: all its layers shrink with them.

    Raises:
        ConfigError: Not even one.
    """
    kept = math.floor(param_ratio * channels + 1e-9)
    if kept < 1:
        raise ConfigError(
            f"param_ratio {param_ratio} leaves none of {channels} channels; raise it to "
            f"{1 / channels:.3g} or more."
        )
    return kept


def _factorized(
    dense: Dense,
    names: list[str],
    param_ratio: float,
    form: Callable[[str], QuadraticForm],
    rule: str,
) -> dict[str, nn.Module]:
    """Low-rank layers within a budget; a layer that is better off dense is left out."""
    if not names:
        return {}
    layers = {name: dense.targets[name] for name in names}
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    found = {n: decompose(linear_weight(layer), form(n)) for n, layer in layers.items()}
    spectra = {name: spectrum for name, (spectrum, _) in found.items()}
    plan = plan_for_budget(shapes, spectra, rule, param_ratio)
    return {
        name: lowrank_from_factors(layers[name], found[name][1], rank)
        for name, rank in plan.ranks.items()
        if rank is not None
    }


def _whitened(moment: SecondMoment) -> QuadraticForm:
    return QuadraticForm(input=Side(moment=moment, damping=LowRankConfig.input_damping))
