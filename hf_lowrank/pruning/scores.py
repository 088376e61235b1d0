"""Which weights survive: the highest scores, in each matrix or in all of them together."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hf_lowrank.errors import NumericalError

# First order: minus the sum of gradient times weight over the steps. Zero order: the weight's size.
CRITERIA = ("movement", "magnitude")
SCOPES = ("layer", "global")


@torch.no_grad()
def add_movement_(scores: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor) -> None:
    """Adds one step to movement scores, in place: `S -= (dL/dW) * W`.

    This is the gradient of the loss by the scores through a straight-through mask (Sanh et al.,
    NeurIPS 2020, section 4). Summing it is their SGD on the scores with a constant rate, whose
    size does not matter to a top-v choice.

    Args:
        scores: Shape (m, n), fp32.
        gradient: Gradient of the loss by the masked weight, shape (m, n).
        weight: The weight before masking, shape (m, n).
    """
    scores.addcmul_(gradient.to(scores.dtype), weight.to(scores.dtype), value=-1)


@torch.no_grad()
def choose_masks(
    scores: Mapping[str, torch.Tensor], density: float, scope: str
) -> dict[str, torch.Tensor]:
    """Masks that keep the highest scores.

    Args:
        scores: One matrix of scores for each layer.
        density: Share of the weights to keep, in (0, 1].
        scope: "layer" keeps this share of every matrix, "global" of all matrices together.

    Returns:
        Boolean masks by layer name. Their number of survivors is exact: equal scores are kept in
        the order of their position.

    Raises:
        NumericalError: A score is NaN or infinite.
    """
    for name, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(f"{name}: its pruning scores hold NaN or infinity.")
    if scope == "layer":
        return {name: _top(values.flatten(), density).view_as(values) for name, values in
                scores.items()}  # fmt: skip
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
