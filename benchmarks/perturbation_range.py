"""The perturbation range: how far first- and second-order predictions of the loss hold."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from hf_lowrank.compression.analysis import Analysis
from hf_lowrank.compression.held_out import HeldOutLoss
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.measuring.items import Batch, LossFunction
from hf_lowrank.modeling.surgery import swapped
from hf_lowrank.ranks.plan import RankPlan

SCALES = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class PerturbationPoint:
    """The model with its weights moved part of the way to their truncation, `W + t (W_k - W)`.

    Attributes:
        scale: t.
        noise: Relative weight noise, `||t D|| / ||W||` over the layers that the plan factorizes.
        measured: Measured rise of the mean loss, nats.
        standard_error: Of the measured rise.
        first_order: `t <Gr, D>`, nats.
        second_order: `t <Gr, D> + t^2` times the predicted rise of the plan, nats.
    """

    scale: float
    noise: float
    measured: float
    standard_error: float
    first_order: float
    second_order: float


def measure_range(
    model: nn.Module,
    analysis: Analysis,
    plan: RankPlan,
    batches: Sequence[Batch],
    *,
    scales: Sequence[float] = SCALES,
    loss_function: LossFunction | None = None,
) -> list[PerturbationPoint]:
    """Loss along the truncation noise of a plan, against what is predicted.

    On the batches of the gradients this tests the expansion, on others the gradients as well.

    Args:
        model: The dense model; it is not changed.
        analysis: Its spectra with prices (metric `kfac`), and the gradients of the mean loss.
        plan: The truncation whose noise is scaled.
        batches: Where the loss is measured.
        scales: Values of t; at 1 the plan itself.
        loss_function: Loss of a batch; by default the model's own task loss.

    Returns:
        One point for each scale, in ascending order.
    """
    held_out = HeldOutLoss(model, batches, loss_function, progress=False)
    weights, noises = {}, {}
    for name, rank in plan.ranks.items():
        if rank is not None:
            weights[name] = linear_weight(model.get_submodule(name)).float()
            noises[name] = analysis.factors[name].product(rank) - weights[name]
    size = math.sqrt(sum(float(W.square().sum()) for W in weights.values()))
    noise = math.sqrt(sum(float(D.square().sum()) for D in noises.values()))
    along = sum(float((analysis.gradients.mean[name] * D).sum()) for name, D in noises.items())
    rise = analysis.predicted_rise(plan)
    points = []
    for t in sorted(scales):
        moved = {name: weights[name] + t * D for name, D in noises.items()}
        found = held_out.compare(reweighted(model, moved))
        points.append(
            PerturbationPoint(
                scale=t,
                noise=t * noise / size if size else 0.0,
                measured=found.mean,
                standard_error=found.standard_error,
                first_order=t * along,
                second_order=t * along + t**2 * rise,
            )
        )
    return points


@contextmanager
def reweighted(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
    """The model with other dense weights, shape (out, in) each, for the time of the block."""
    layers = {}
    for name, weight in weights.items():
        layers[name] = copy.deepcopy(model.get_submodule(name))
        with torch.no_grad():
            linear_weight(layers[name]).copy_(weight)
    with swapped(model, layers):
        yield model


def linear_range(points: Sequence[PerturbationPoint], tolerance: float = 0.5) -> float:
    """Relative weight noise up to which the first-order prediction holds.

    Args:
        points: From `measure_range`.
        tolerance: Largest `|measured - first order| / |first order|`.

    Returns:
        Noise of the last point in a row from the smallest on that holds; 0 if none does.
    """
    reached = 0.0
    for point in sorted(points, key=lambda point: point.scale):
        if abs(point.measured - point.first_order) > tolerance * abs(point.first_order):
            break
        reached = point.noise
    return reached


def format_range(points: Sequence[PerturbationPoint]) -> str:
    """The points as a Markdown table."""
    lines = [
        "| t | weight noise | measured | +- | first order | second order |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {p.scale:g} | {p.noise:.2e} | {p.measured:+.5f} | {p.standard_error:.5f} | "
        f"{p.first_order:+.5f} | {p.second_order:+.5f} |"
        for p in points
    ]
    return "\n".join(lines)
