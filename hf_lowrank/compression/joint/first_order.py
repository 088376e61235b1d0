"""First-order terms: what the truncation error does along the gradient.

Notation: `Gr = d(mean loss)/dW` and `D = W_k - W`, the change of the weight, so that
`loss(W + D) - loss(W) = <Gr, D> + second order`.
See docs/methods.md, 5.
"""

from __future__ import annotations

import torch

from hf_lowrank.decomposition.metrics import QuadraticForm
from hf_lowrank.decomposition.spectrum import Factors, decompose
from hf_lowrank.ranks.hull import tail_sums


def first_order_terms(factors: Factors, gradient: torch.Tensor) -> torch.Tensor:
    """First-order change of the mean loss from dropping each component, nats, shape (r,).

    `lin_i = -sigma_i u_i^T (L^-1 Gr R^-T) v_i`. Component i of the weight itself is
    `left_i right_i = L^-T sigma_i u_i v_i^T R^-1`, so this is `-<Gr, left_i right_i>`.

    Args:
        factors: Factors of the weight, in any metric.
        gradient: Gr, shape (m, n).
    """
    images = gradient.double() @ factors.right.double().T
    return -(images * factors.left.double()).sum(dim=0).cpu()


def trusted_tails(price: torch.Tensor, linear: torch.Tensor, trust: float) -> torch.Tensor:
    """Predicted rise of the loss at each rank, shape (r + 1,): prices, corrected within limits.

    The sum of the dropped prices plus that of the dropped first-order terms, the latter cut off
    at `trust` times the former. Gradients are estimated from few batches and hold only near the
    dense weights, while sums of prices are close to the truth; unlimited first-order terms have
    been seen to ruin the choice.

    Args:
        price: Second-order rise from dropping each component, nats, shape (r,).
        linear: First-order change from dropping each component, nats, shape (r,).
        trust: Limit of the correction, as a share of the prices; 0 leaves the prices alone.
    """
    second = tail_sums(price)
    limit = trust * second
    return second + tail_sums(linear).clamp(-limit, limit)


def corrected_factors(
    weight: torch.Tensor,
    factors: Factors,
    rank: int,
    gradient: torch.Tensor,
    form: QuadraticForm,
    largest_step: float,
) -> Factors | None:
    """The truncated weight without the part of its error that raises the loss, truncated again.

    `D' = D - max(0, <Gr, D>) / <Gr, Gr> Gr`, then the rank-k truncation of `W + D'`.

    Args:
        weight: W, shape (m, n).
        factors: Its factors.
        rank: k.
        gradient: Gr, shape (m, n).
        form: Metric of the second truncation; see `Gradients`.
        largest_step: Limit of `||D' - D|| / ||W||`.

    Returns:
        Factors of k components; None where the error lowers the loss already.

    Raises:
        NumericalError: The decomposition failed.
    """
    W, Gr = weight.double(), gradient.double()
    truncated = factors.left[:, :rank].double() @ factors.right[:rank].double()
    along = float((Gr * (truncated - W)).sum())
    size = float(Gr.norm())
    if along <= 0 or size == 0:
        return None
    step = min(along / size**2, largest_step * float(W.norm()) / size)
    _, moved = decompose(truncated - step * Gr, form, dtype=factors.left.dtype)
    return Factors(moved.left[:, :rank], moved.right[:rank])
