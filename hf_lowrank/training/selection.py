"""Rank selection during training: IJCAI 2025, Algorithms 1 and 2, with their slips mended.

A threshold on all layers' spectra is bisected on the measured task loss; the last feasible point
is applied (docs/methods.md, section 3). `relative` keeps component i iff
`sigma_i / sigma_1 >= delta` and bisects delta; `price` bisects the parameter budget.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_lowrank.decomposition.metrics import METRICS, MetricSettings
from hf_lowrank.decomposition.spectrum import Factors, Spectrum, decompose
from hf_lowrank.decomposition.thin import thin_svd
from hf_lowrank.errors import ConfigError, in_layer
from hf_lowrank.evaluation.perplexity import ItemLoss, iterate_losses
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.embeddings import EmbeddingLoss
from hf_lowrank.measuring.items import Batch, LossFunction, without_labels
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.threshold import (
    plan_for_budget,
    plan_for_threshold,
    predicted_rise,
    smallest_ratio,
)
from hf_lowrank.ranks.tolerance import LossDifference, Probe, paired_difference, search_tolerance
from hf_lowrank.training.truncation import get_factors, probed

_ADVICE = "Lower the learning rate, or exclude the layer."


@dataclass(frozen=True)
class SelectionSettings:
    """How to select; see the fields of `LowRankTrainingArguments` of similar names.

    With `param_ratio` the selection spends that budget and looks at no loss; `dense_shapes` are the
    target layers that stay dense and count towards it. Sizes are those of the stored `form`. The
    loss is that of the model's head without a `loss_function`.
    """

    rule: str
    tolerance: float
    precision: float
    smallest_ratio: float
    label_source: str
    seed: int
    damping: MetricSettings
    param_ratio: float | None = None
    dense_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    form: str = "factors"
    loss_function: LossFunction | None = None


@dataclass(frozen=True)
class Selection:
    """Result of one selection.

    Attributes:
        plan: Chosen ranks; None where a layer is not cut below break-even.
        factors: What the plan is cut from.
        probes: Steps of the bisection.
        loss_passes: Passes over the selection batches, the reference pass not counted.
        decompositions: Number of spectra computed.
        seconds: Wall time.
    """

    plan: RankPlan
    factors: Mapping[str, Factors]
    probes: Sequence[Probe]
    loss_passes: int
    decompositions: int
    seconds: float


def select_ranks(
    model: nn.Module,
    layers: Mapping[str, LowRankLinear],
    batches: Sequence[Batch],
    reference: Sequence[ItemLoss],
    settings: SelectionSettings,
) -> Selection:
    """Chooses the smallest ranks that keep the task loss within the tolerance; edits nothing.

    Args:
        model: The model in training.
        layers: Its layers in training form.
        batches: Batches with labels, on which the loss is measured.
        reference: Losses of the same items under the reference model.
        settings: Rule and tolerance.
    """
    start = time.perf_counter()
    spectra, factors = layer_spectra(model, layers, batches, settings)
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    shapes |= dict(settings.dense_shapes)
    fixed: dict[str, int | None] = dict.fromkeys(settings.dense_shapes)
    limits: dict[str, Any] = {"fixed": fixed, "form": settings.form}

    def plan_at(share: float) -> RankPlan:
        if settings.rule == "relative":
            return plan_for_threshold(shapes, spectra, "relative", 1.0 - share, **limits)
        return plan_for_budget(shapes, spectra, settings.rule, share, **limits)

    def predict(plan: RankPlan) -> float:
        return predicted_rise(spectra, plan) if settings.rule == "price" else math.nan

    def measure(plan: RankPlan, tolerance: float) -> LossDifference:
        if plan.param_ratio < settings.smallest_ratio:
            return LossDifference(math.inf, 0.0, 0, False)
        with probed(layers, factors, plan.ranks):
            now = iterate_losses(model, batches, loss_function=settings.loss_function)
            return paired_difference(reference, now, tolerance)

    floor = smallest_ratio(shapes, **limits)
    if settings.param_ratio is not None:
        share = max(settings.param_ratio, floor)
        plan = plan_for_budget(shapes, spectra, settings.rule, share, **limits)
        seconds = time.perf_counter() - start
        return Selection(plan, factors, [], int(settings.rule == "price"), len(layers), seconds)
    plan, probes = search_tolerance(
        plan_at,
        predict,
        measure,
        settings.tolerance,
        smallest=max(settings.smallest_ratio, floor) if settings.rule == "price" else 0.0,
        precision=settings.precision,
    )
    passes = len(probes) + (settings.rule == "price")
    seconds = time.perf_counter() - start
    return Selection(plan, factors, probes, passes, len(layers), seconds)


def layer_spectra(
    model: nn.Module,
    layers: Mapping[str, LowRankLinear],
    batches: Sequence[Batch],
    settings: SelectionSettings,
) -> tuple[dict[str, Spectrum], dict[str, Factors]]:
    """Spectra and factors of the layers' products, from their thin factors alone.

    For `price` the second factor `B` is decomposed in the `kfac` metric of its own inputs
    `z = s * (A x)` and outputs: `B Cov(z) B^T = W Cov(x) W^T`, so the singular values are those of
    the whole layer, its tokens weighted by `|g| / |z|` (`evenly`), and the k x k sums of z and of
    `B^T g` are all that has to be collected. Of embeddings, the goals are drawn around the model's
    own: gradients towards one that is met vanish. The labels of a loss function can't be drawn;
    they are the data's.

    Raises:
        ConfigError: The rule is none of the two.
        NumericalError: A layer can't be decomposed.
    """
    spectra, factors = dict[str, Spectrum](), dict[str, Factors]()
    if settings.rule == "relative":
        for name, layer in layers.items():
            with in_layer(name, _ADVICE):
                spectra[name], factors[name] = _thin_spectrum(layer)
        return spectra, factors
    if settings.rule != "price":
        raise ConfigError(f"The selection rule must be relative or price, got {settings.rule!r}.")
    kfac = METRICS["kfac"]
    second_factors: dict[str, nn.Module] = {n: layer.lowrank_B for n, layer in layers.items()}
    loss_function = settings.loss_function
    if isinstance(loss_function, EmbeddingLoss) and settings.label_source == "model":
        batches = [without_labels(batch) for batch in batches]
    moments = collect_moments(
        model,
        second_factors,
        batches,
        kfac.needs,
        even=kfac.even,
        loss_function=loss_function,
        label_source=settings.label_source,
        seed=settings.seed,
    )
    for name, layer in layers.items():
        U, s, V = get_factors(layer)
        with in_layer(name, _ADVICE):
            found, second = decompose(U, kfac.form(moments[name], settings.damping))
        spectra[name] = Spectrum(linear_shape(layer), found.sigma, found.price)
        factors[name] = Factors(second.left, second.right @ (s.float()[:, None] * V.float()))
    return spectra, factors


@torch.no_grad()
def _thin_spectrum(layer: LowRankLinear) -> tuple[Spectrum, Factors]:
    """Plain singular values of the layer's product; see `thin_svd`."""
    U, s, V = get_factors(layer)
    left, sigma, right = thin_svd(U * s, V)
    factors = Factors((left * sigma).float(), right.float())
    return Spectrum(linear_shape(layer), sigma, None), factors
