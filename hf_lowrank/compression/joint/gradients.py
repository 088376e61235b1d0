"""Mean gradients of the targeted layers, and the sides of the metric that hold for any weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hf_lowrank.compression.analysis import metric_settings
from hf_lowrank.compression.joint.first_order import retruncation_form
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import METRICS, QuadraticForm
from hf_lowrank.decomposition.moments import Moments
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.items import Batch


class GradientReader:
    """Reads what the joint system needs from the moments of an analysis as they pass by.

    Everything is held at once, in fp32: the gradients take as much memory as the targeted weights.

    Args:
        config: Its damping is that of the forms.

    Attributes:
        needs: Moments that it reads besides those of the metric.
        gradients: Gradient of the mean loss by layer name, shape (m, n).
        forms: The `kfac` metric by layer name, without the sides that hold for the dense weight
            alone.
    """

    needs = frozenset({"gradient"})

    def __init__(self, config: LowRankConfig) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.forms: dict[str, QuadraticForm] = {}
        self._settings = metric_settings(config)

    def read(self, moments: Mapping[str, Moments]) -> None:
        """Takes the gradients out of the moments of some layers, and keeps the forms."""
        for name, moment in moments.items():
            assert moment.gradient is not None  # asked for
            self.gradients[name] = moment.gradient / moment.losses
            moment.gradient = None
            form = METRICS["kfac"].form(moment, self._settings)
            self.forms[name] = retruncation_form(form)

    def collect(
        self, model: nn.Module, targets: Mapping[str, nn.Module], batches: Sequence[Batch]
    ) -> dict[str, Moments]:
        """Reads a pass of its own, with the labels of the data; returns its second moments.

        Labels drawn from the model have no gradient on average.
        """
        moments = collect_moments(model, targets, batches, METRICS["kfac"].needs | self.needs)
        self.read(moments)
        return moments
