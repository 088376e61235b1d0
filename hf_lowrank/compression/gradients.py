"""Mean gradients of the targeted layers, and the sides of the metric that hold for any weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import METRICS, MetricSettings, QuadraticForm, Side
from hf_lowrank.decomposition.moments import Moments
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.items import Batch


@dataclass(frozen=True)
class Gradients:
    """What the joint system needs beside spectra and factors, by layer name.

    Everything is held at once, in fp32: the gradients take as much memory as the targeted weights.

    Attributes:
        mean: Gradient of the mean loss, shape (m, n).
        forms: The `kfac` metric without the sides that hold for the dense weight alone.
    """

    mean: Mapping[str, torch.Tensor] = field(default_factory=dict)
    forms: Mapping[str, QuadraticForm] = field(default_factory=dict)

    def __or__(self, other: Gradients) -> Gradients:
        """Those of both."""
        return Gradients({**self.mean, **other.mean}, {**self.forms, **other.forms})


def metric_settings(config: LowRankConfig) -> MetricSettings:
    """The numbers that metrics read, from the config."""
    return MetricSettings(config.input_damping, config.output_damping, config.activation_alpha)


def take_gradients(moments: Mapping[str, Moments], settings: MetricSettings) -> Gradients:
    """Takes the gradients out of the moments of some layers, and makes their forms.

    Args:
        moments: With `gradient` and what `kfac` needs; the gradients are gone afterwards.
        settings: Damping of the forms.
    """
    mean, forms = {}, {}
    for name, moment in moments.items():
        assert moment.gradient is not None  # asked for
        mean[name] = moment.gradient / moment.losses
        moment.gradient = None
        forms[name] = retruncation_form(METRICS["kfac"].form(moment, settings))
    return Gradients(mean, forms)


def collect_gradients(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    config: LowRankConfig,
) -> Gradients:
    """Gradients by a pass of their own, with the labels of the data.

    Labels drawn from the model have no gradient on average.
    """
    kfac = METRICS["kfac"]
    moments = collect_moments(model, targets, batches, kfac.needs | {"gradient"}, even=kfac.even)
    return take_gradients(moments, metric_settings(config))


def retruncation_form(form: QuadraticForm) -> QuadraticForm:
    """The sides of a metric that hold for any weight.

    A moment of images under the dense weight (decomposition/moments.py) says nothing about
    another weight; such a side is left out.
    """

    def kept(side: Side) -> Side:
        return Side() if side.moment is not None and side.moment.is_projected else side

    return QuadraticForm(kept(form.output), kept(form.input))
