"""The SVD of a product of thin factors, without ever forming the product."""

from __future__ import annotations

import torch

from hf_lowrank.decomposition.spectrum import check_finite
from hf_lowrank.errors import NumericalError


def thin_svd(
    left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD of `left @ right` from the QR of both factors and the SVD of the small core.

    `left = Q1 R1`, `right^T = Q2 R2`, `R1 R2^T = P S O^T`, so `U = Q1 P`, `Vh = (Q2 O)^T`.

    Args:
        left: Shape (m, k).
        right: Shape (k, n).

    Returns:
        `U` (m, r), `s` (r,) descending and `Vh` (r, n), r = min(k, m, n), in fp64.

    Raises:
        NumericalError: See `finite_svd`.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    core_u, singular_values, core_vh = finite_svd(r_left @ r_right.T)
    return q_left @ core_u, singular_values, core_vh @ q_right.T


def finite_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The thin SVD of a matrix.

    Raises:
        NumericalError: It holds NaN or infinity, or the solver failed.
    """
    check_finite("weight", matrix)
    try:
        U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise NumericalError(f"the SVD failed ({error})") from error
    return U, s, Vh
