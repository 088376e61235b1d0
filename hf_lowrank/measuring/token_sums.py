"""Sums over the unmasked tokens of a batch, in fp32."""

from __future__ import annotations

import torch

from hf_lowrank.decomposition.moments import SecondMoment

_BLOCK = 256


def unmasked_rows(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Unmasked positions as rows, shape (tokens, features)."""
    if mask is not None and not bool(mask.all()):
        return tensor[mask]
    return tensor.reshape(-1, tensor.shape[-1])


def sequences_of(tensor: torch.Tensor, batch_size: int) -> int:
    """How many sequences an activation's positions belong to; 1 where they are no longer apart."""
    return batch_size if tensor.shape[:-1].numel() % batch_size == 0 else 1


def centred(tensor: torch.Tensor, mask: torch.Tensor | None, batch_size: int) -> torch.Tensor:
    """The vectors less their mean over the unmasked positions of each sequence, in fp32.

    A sequence of a single position has no spread and stays as it is.
    """
    vectors = tensor.float().reshape(sequences_of(tensor, batch_size), -1, tensor.shape[-1])
    if vectors.shape[1] == 1:
        return tensor.float()
    weights = vectors.new_ones(vectors.shape[:2])
    if mask is not None:
        weights = mask.to(vectors).reshape(len(vectors), -1)
    total = (vectors * weights[..., None]).sum(dim=1) / weights.sum(dim=1)[:, None].clamp_min(1)
    return (vectors - total[:, None]).reshape(tensor.shape)


def squared_rows(gradients: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Row sums of the squared weight gradients `G^T X` of the sequences, summed over these.

    Args:
        gradients: G, shape (sequences, length, m).
        rows: X, shape (sequences, length, n).

    Returns:
        Shape (m,).
    """
    if rows.shape[1] < rows.shape[2]:  # diag(G^T (X X^T) G), without a matrix of shape (m, n)
        return ((rows @ rows.mT @ gradients) * gradients).sum(dim=(0, 1))
    return (gradients.mT @ rows).square().sum(dim=(0, 2))


def added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """The total with one more part, in place where there is one."""
    return part.clone() if total is None else total.add_(part)


def added_outer(
    total: SecondMoment | None,
    rows: torch.Tensor,
    squares: float | None = None,
    size: int | None = None,
) -> SecondMoment:
    """Adds `rows^T rows`, its lower blocks only: a symmetric matrix needs no more."""
    rows = rows.float()
    if squares is None or size is None:
        squares, size = float(rows.square().sum()), rows.shape[1]
    if total is None:
        total = SecondMoment(rows.new_zeros(rows.shape[1], rows.shape[1]), 0.0, size)
    total.squares += squares
    for start in range(0, rows.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        below = slice(start, None)
        total.matrix[below, block].addmm_(rows[:, below].T, rows[:, block])
    return total


def mirror_(matrix: torch.Tensor) -> None:
    """Fills the upper triangle from the lower one, in place."""
    lower = matrix.tril(-1)
    matrix.tril_().add_(lower.T)
