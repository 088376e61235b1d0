"""First-order terms: what the truncation error does along the gradient.

Notation: `Gr = d(mean loss)/dW` and `D = W_k - W`, the change of the weight, so that
`loss(W + D) - loss(W) = <Gr, D> + second order`.
"""

from __future__ import annotations

import torch

from hf_lowrank.decomposition.metrics import QuadraticForm, Side
from hf_lowrank.decomposition.spectrum import Spectrum, decompose
from hf_lowrank.ranks.threshold import tail_sums


def first_order_terms(spectrum: Spectrum, gradient: torch.Tensor) -> torch.Tensor:
    """First-order change of the mean loss from dropping each component, nats, shape (r,).

    `lin_i = -sigma_i u_i^T (L^-1 Gr R^-T) v_i`. Component i of the weight itself is
    `left_i right_i = L^-T sigma_i u_i v_i^T R^-1`, so this is `-<Gr, left_i right_i>`.

    Args:
        spectrum: Spectrum of the weight, in any metric.
        gradient: Gr, shape (m, n).
    """
    images = gradient.double() @ spectrum.right.double().T
    return -(images * spectrum.left.double()).sum(dim=0).cpu()


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


def corrected_spectrum(
    weight: torch.Tensor,
    spectrum: Spectrum,
    rank: int,
    gradient: torch.Tensor,
    form: QuadraticForm,
    largest_step: float,
) -> Spectrum | None:
    """The truncated weight without the part of its error that raises the loss, truncated again.

    `D' = D - max(0, <Gr, D>) / <Gr, Gr> Gr`, then the rank-k truncation of `W + D'`.

    Args:
        weight: W, shape (m, n).
        spectrum: Its spectrum.
        rank: k.
        gradient: Gr, shape (m, n).
        form: Metric of the second truncation; see `retruncation_form`.
        largest_step: Limit of `||D' - D|| / ||W||`.

    Returns:
        A spectrum of k components, without prices; None where the error lowers the loss already.

    Raises:
        NumericalError: The decomposition failed.
    """
    W, Gr = weight.double(), gradient.double()
    truncated = spectrum.left[:, :rank].double() @ spectrum.right[:rank].double()
    along = float((Gr * (truncated - W)).sum())
    size = float(Gr.norm())
    if along <= 0 or size == 0:
        return None
    step = min(along / size**2, largest_step * float(W.norm()) / size)
    moved = decompose(truncated - step * Gr, form, dtype=spectrum.left.dtype)
    return Spectrum(moved.left[:, :rank], moved.right[:rank], moved.sigma[:rank], None)


def retruncation_form(form: QuadraticForm) -> QuadraticForm:
    """The sides of a metric that hold for any weight.

    A moment of images under the dense weight (decomposition/moments.py) says nothing about
    another weight; such a side is left out.
    """

    def kept(side: Side) -> Side:
        return Side() if side.moment is not None and side.moment.is_projected else side

    return QuadraticForm(kept(form.output), kept(form.input))
