"""From a weight and a metric to its spectrum and to factors at any rank.

The spectrum is small and all that choosing needs; the factors are as large as the weight and
needed only where a rank is put into force.

The SVD of `M = L^T W R` is had from the eigenvalues of the Gram matrix of its smaller side, in
fp64. For `m >= n`, with `P = L L^T` and `Q = R R^T`:

    Gram = M^T M = R^T (W^T P W) R = V diag(sigma^2) V^T,
    W_k  = L^-T U_k Sigma_k V_k^T R^-1 = (W R V_k) (V_k^T R^-1).

So the larger side needs neither a root nor an inverse, only its image `W^T P W`, and one
triangular solve of the smaller size is left. For `m < n` the same is done with the transpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_lowrank.decomposition.metrics import QuadraticForm, Side
from hf_lowrank.errors import NumericalError


@dataclass(frozen=True)
class Spectrum:
    """What each component of one weight is worth.

    Attributes:
        shape: (out_features, in_features) of the weight.
        sigma: Singular values in the metric, shape (r,), r <= min(m, n), fp64, descending.
        price: Predicted rise of the mean loss, nats, from dropping each component, shape (r,),
            or None where the metric carries no price.
        traces: The price scale, tr P and tr Q, undamped, or None where the metric carries no
            price. An error that is white costs the product of all three times its mean square.
    """

    shape: tuple[int, int]
    sigma: torch.Tensor
    price: torch.Tensor | None
    traces: tuple[float, float, float] | None = None

    def predicted_rise(self, rank: int | None) -> float:
        """Predicted rise of the mean loss at this rank (nats); 0 for dense, NaN without prices."""
        if rank is None:
            return 0.0
        return float("nan") if self.price is None else float(self.price[rank:].sum())


@dataclass(frozen=True)
class Factors:
    """All rank-k approximations of one weight, for every k at once.

    The components of the smaller side are orthonormal in the metric (`right = V^T R^-1` for
    m >= n), those of the other side carry the singular values.

    Attributes:
        left: Shape (m, r), r <= min(m, n); `left[:, :k] @ right[:k]` is the best W_k.
        right: Shape (r, n).
    """

    left: torch.Tensor
    right: torch.Tensor

    def product(self, rank: int) -> torch.Tensor:
        """W_k, shape (m, n)."""
        return self.left[:, :rank] @ self.right[:rank]

    def balanced(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(A, B)` of shapes (rank, n) and (m, rank) with `W_rank = B @ A`.

        Each component's scale is shared equally between its row of A and its column of B, which
        suits low-precision storage and training.
        """
        left, right = self.left[:, :rank], self.right[:rank]
        tiny = torch.finfo(left.dtype).tiny
        scale = (right.norm(dim=1).clamp_min(tiny) / left.norm(dim=0).clamp_min(tiny)).sqrt()
        return right / scale[:, None], left * scale


def decompose(
    weight: torch.Tensor, form: QuadraticForm, *, dtype: torch.dtype = torch.float32
) -> tuple[Spectrum, Factors]:
    """Spectrum and factors of a weight in a metric.

    Args:
        weight: Shape (m, n), any floating dtype.
        form: The metric's two sides.
        dtype: Data type in which the factors are kept; the computation is in fp64.

    Returns:
        The spectrum, its components in descending order of singular value, and the factors.

    Raises:
        NumericalError: The weight or the metric holds NaN or infinity, or the eigenvalue solver
            failed.
    """
    check_finite("weight", weight)
    matrix = weight.double()
    is_tall = matrix.shape[0] >= matrix.shape[1]
    output, inputs = _counted(form.output, matrix), _counted(form.input, matrix.T)
    if is_tall:
        left, right, sigma = _decompose_tall(matrix, output, inputs)
    else:
        left, right, sigma = _decompose_tall(matrix.T, inputs, output)
        left, right = right.T, left.T
    missing = min(weight.shape) - len(sigma)
    if missing:  # a singular metric: the directions that it does not see cost nothing
        sigma = F.pad(sigma, (0, missing))
        left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
    sigma = sigma.cpu()
    price = None if form.price_scale is None else sigma**2 * form.price_scale
    outer, inner, traces = form.output.moment, form.input.moment, None
    if form.price_scale is not None and outer is not None and inner is not None:
        traces = form.price_scale, outer.squares, inner.squares
    spectrum = Spectrum((weight.shape[0], weight.shape[1]), sigma, price, traces)
    return spectrum, Factors(left.to(dtype).contiguous(), right.to(dtype).contiguous())


def _decompose_tall(
    matrix: torch.Tensor, large: Side, small: Side
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(W R V, V^T R^-1, sigma)` for a matrix with no more columns than rows."""
    inner = _image(matrix, large)
    if small.moment is None:
        scale = torch.ones_like(matrix[0])
        if small.diagonal is not None:
            check_finite("diagonal", small.diagonal)
            scale = small.diagonal.to(matrix).sqrt()
            if not bool((scale > 0).all()):
                count = int((~(scale > 0)).sum())
                raise NumericalError(f"{count} entries of the diagonal are not positive")
        sigma, basis = _eigenbasis(scale[:, None] * inner * scale)
        return matrix @ (scale[:, None] * basis), basis.T / scale, sigma
    root = matrix_root(damped(small.moment.matrix.to(matrix), small))
    sigma, basis = _eigenbasis(root.T @ inner @ root)
    if root.shape[0] == root.shape[1] and not bool(root.triu(1).any()):
        # V^T R^-1, as the solution X of X R = V^T with R lower triangular.
        right = torch.linalg.solve_triangular(root, basis.T, upper=False, left=False)
    else:
        right = basis.T @ torch.linalg.pinv(root)
    return matrix @ (root @ basis), right, sigma


def _counted(side: Side, matrix: torch.Tensor) -> Side:
    """The side with its survivors counted: non-zero entries of the matrix's rows, at least 1.

    A row without survivors is zero, and so it stays in every approximation; the 1 only keeps the
    form invertible.
    """
    if not side.survivors:
        return side
    return Side(diagonal=(matrix != 0).sum(dim=1).to(matrix).clamp_min(1.0))


def _image(matrix: torch.Tensor, side: Side) -> torch.Tensor:
    """`W^T P W`, shape (n, n), for the side of the larger dimension."""
    if side.diagonal is not None:
        check_finite("diagonal", side.diagonal)
        return matrix.T @ (side.diagonal.to(matrix)[:, None] * matrix)
    if side.moment is None:
        return matrix.T @ matrix
    moment = side.moment.matrix.to(matrix)
    if side.moment.is_projected:
        check_finite("second moment", moment)
        return moment + side.damping * side.moment.mean_diagonal * (matrix.T @ matrix)
    return matrix.T @ damped(moment, side) @ matrix


def damped(moment: torch.Tensor, side: Side) -> torch.Tensor:
    """A copy of a side's second moment with the side's damping on its diagonal.

    Raises:
        NumericalError: It holds NaN or infinity.
    """
    check_finite("second moment", moment)
    result = moment.clone()
    if side.moment is not None:
        result.diagonal().add_(side.damping * side.moment.mean_diagonal)
    return result


def check_finite(what: str, tensor: torch.Tensor) -> None:
    """Refuses NaN and infinity.

    Raises:
        NumericalError: It holds some.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise NumericalError(f"the {what} holds NaN or infinity")


def matrix_root(form: torch.Tensor) -> torch.Tensor:
    """`R` with `form = R R^T`: lower triangular by Cholesky, else (n, r) from eigenvalues.

    Where Cholesky fails, eigenvalues under 1e-10 of the largest are dropped.

    Raises:
        NumericalError: The matrix has no positive eigenvalue.
    """
    form = form.double()
    root: torch.Tensor
    root, failed = torch.linalg.cholesky_ex(form)
    if not int(failed):
        return root
    values, vectors = _eigh(form)
    keep = values > 1e-10 * values[-1].clamp_min(0)
    if not bool(keep.any()) or float(values[-1]) <= 0:
        raise NumericalError("a second moment has no positive eigenvalue")
    return vectors[:, keep] * values[keep].sqrt()


def _eigenbasis(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values, descending, and right singular vectors as columns."""
    values, vectors = _eigh((gram + gram.T) / 2)
    return values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


def _eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:
        raise NumericalError(f"the eigenvalue solver failed ({error})") from error
    if not bool(torch.isfinite(values).all()):
        raise NumericalError("the eigenvalue solver returned NaN or infinity")
    return values, vectors
