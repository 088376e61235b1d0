"""Which weights survive: three measures of importance, and one threshold over all matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from hf_lowrank.errors import NumericalError

Matrices = dict[str, torch.Tensor]
# PLATON (Zhang et al., ICML 2022): how much of the mean and of the deviation a window leaves.
_MEAN_KEPT, _DEVIATION_KEPT = 0.85, 0.95
# Movement pruning (Sanh et al., NeurIPS 2020) and its L1 term as in SMP (Jiang et al. 2023).
SCORE_RATE = 1e-2
_L1_WEIGHT = 400.0


class Criterion:
    """How important each weight is, from what happens to it while it trains.

    Args:
        weights: The matrices that are pruned, by layer name.

    Attributes:
        state: What a resumed run needs, matrices by layer name by part.
    """

    reads_gradients: ClassVar[bool] = True
    restarts: ClassVar[bool] = False  # whether a dropped weight trains on from 0

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.state: dict[str, Matrices] = {}

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor, density: float) -> None:
        """Takes one step into account.

        Args:
            name: The layer.
            weight: Its weight before masking and before the step, shape (m, n).
            gradient: Gradient of the loss by the masked weight, shape (m, n).
            density: Share of all weights that the masks keep now.
        """

    def scores(self, weights: Mapping[str, torch.Tensor]) -> Matrices:
        """Importances now, in fp32, for a new choice of the survivors.

        Args:
            weights: The weights before masking, after the last step.
        """
        raise NotImplementedError


class Magnitude(Criterion):
    """Zero order: the size of the weight."""

    reads_gradients = False

    def scores(self, weights: Mapping[str, torch.Tensor]) -> Matrices:
        """`|w|`."""
        return {name: weight.float().abs() for name, weight in weights.items()}


class Movement(Criterion):
    """First order, signed: scores S that are trained beside the weights (Sanh et al. 2020).

    Their gradient through a straight-through mask is `dL/dS = (dL/dW') * W`; an L1 term on their
    sigmoid, `weight * dropped share * mean over matrices of mean sigma(S)`, pulls them down
    together. The trainer's optimizer steps them at `SCORE_RATE`, on its schedule.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__(weights)
        self.state["scores"] = {
            name: nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
            for name, weight in weights.items()
        }

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor, density: float) -> None:
        """Sets the gradient of the scores."""
        scores = self.state["scores"][name]
        chance = scores.detach().sigmoid()
        pull = _L1_WEIGHT * (1 - density) / (len(self.state["scores"]) * scores.numel())
        scores.grad = gradient.float() * weight.float() + pull * chance * (1 - chance)

    def scores(self, weights: Mapping[str, torch.Tensor]) -> Matrices:
        """S."""
        return {name: values.detach() for name, values in self.state["scores"].items()}


class Sensitivity(Criterion):
    """First order, unsigned: mean `|w g|` of a window times its usual deviation (PLATON, 2022).

    Over each window of steps, with `I` the mean of `|w g|`:

        M <- 0.85 M + 0.15 I,   D <- 0.95 D + 0.05 |I - M|,   score M D.

    A dropped weight is set to 0 and trains on from there under its mask.
    """

    restarts = True

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__(weights)
        for part in ("window", "mean", "deviation"):
            self.state[part] = {
                n: torch.zeros_like(w, dtype=torch.float32) for n, w in weights.items()
            }
        self.state["steps"] = {n: w.new_zeros((), dtype=torch.int64) for n, w in weights.items()}

    def add(self, name: str, weight: torch.Tensor, gradient: torch.Tensor, density: float) -> None:
        """Adds `|w g|` to the window."""
        self.state["window"][name] += (weight.float() * gradient.float()).abs_()
        self.state["steps"][name] += 1

    def scores(self, weights: Mapping[str, torch.Tensor]) -> Matrices:
        """Closes the window and gives `M D`."""
        found = {}
        for name, total in self.state["window"].items():
            steps, mean = self.state["steps"][name], self.state["mean"][name]
            deviation = self.state["deviation"][name]
            importance = total / steps.clamp_min(1)
            mean.lerp_(importance, 1 - _MEAN_KEPT)
            deviation.lerp_((importance - mean).abs_(), 1 - _DEVIATION_KEPT)
            found[name] = mean * deviation
            total.zero_()
            steps.zero_()
        return found


CRITERIA: dict[str, type[Criterion]] = {
    "sensitivity": Sensitivity,
    "movement": Movement,
    "magnitude": Magnitude,
}


@torch.no_grad()
def choose_masks(scores: Mapping[str, torch.Tensor], density: float) -> Matrices:
    """Masks that keep the highest scores of all matrices together.

    Args:
        scores: One matrix of scores for each layer.
        density: Share of all weights to keep, in (0, 1].

    Returns:
        Boolean masks by layer name. Their number of survivors is exact, and at least 1: equal
        scores are kept in the order of their position.

    Raises:
        NumericalError: A score is NaN or infinite.
    """
    for name, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(
                f"{name}: its pruning scores hold NaN or infinity; lower the learning rate."
            )
    kept = _top(torch.cat([values.flatten() for values in scores.values()]), density)
    parts = kept.split([values.numel() for values in scores.values()])
    return {
        name: part.view_as(values)
        for (name, values), part in zip(scores.items(), parts, strict=True)
    }


def _top(values: torch.Tensor, density: float) -> torch.Tensor:
    """Mask of the highest values, at least one of them."""
    size = values.numel()
    wanted = min(size, max(1, round(density * size)))
    if wanted == size:
        return torch.ones_like(values, dtype=torch.bool)
    largest_dropped = torch.kthvalue(values, size - wanted).values
    mask = values > largest_dropped
    missing = wanted - int(mask.sum())
    if missing:
        mask[(values == largest_dropped).nonzero()[:missing]] = True
    return mask
