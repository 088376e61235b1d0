"""A low-rank matrix as pivot columns, and the coefficients that make the others of them.

See docs/methods.md, 2.6.
"""

from __future__ import annotations

import torch

from hf_lowrank.decomposition.spectrum import check_finite

# No coefficient is larger, so that rounding errors of the pivots are not blown up.
LARGEST_COEFFICIENT = 2.0


def compact_columns(
    left: torch.Tensor, right: torch.Tensor, rank: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best approximation of rank k, as `W[:, order] = Q [I T]`.

    Q is fitted to the weight in the metric after T was rounded, and so takes up that rounding.
    With `right = V^T R^-1` square, R the root of the inputs' second moment, that is the smallest
    `|(W - Q M) R|`, M = [I T] in the old order: `Q = left X (X^T X)^-1`, `X = right^-T M^T`.

    Args:
        left: Shape (m, r), of all components, in descending order; `left @ right` is the weight.
        right: Shape (r, n), orthonormal in the metric: of m and n the smaller one's factor.
        rank: k, less than n.
        dtype: Data type in which T will be stored.

    Returns:
        Q of shape (m, k) and T of shape (k, n - k), fp64, T rounded to `dtype`; and the order of
        the columns, pivots first and the rest ascending, shape (n,).

    Raises:
        NumericalError: A factor holds NaN or infinity.
    """
    left, right = left.double(), right.double()
    for factor in (left, right):
        check_finite("factor", factor)
    order, coefficients = pivot_columns(right[:rank])
    coefficients = coefficients.to(dtype).double()
    unit = torch.eye(rank, dtype=right.dtype, device=right.device)
    rows = torch.cat((unit, coefficients), dim=1)[:, order.argsort()]
    if right.shape[0] == right.shape[1]:
        image, singular = torch.linalg.solve_ex(right.T, rows.T)
        root, failed = torch.linalg.cholesky_ex(image.T @ image)
        if not bool(singular) and not bool(failed):
            return torch.cholesky_solve((left @ image).T, root).T, coefficients, order
    # A singular metric: fitted to the product, all inputs alike. `M M^T = I + T T^T` has a root.
    root = torch.linalg.cholesky(rows @ rows.T)
    target = left[:, :rank] @ (right[:rank] @ rows.T)
    return torch.cholesky_solve(target.T, root).T, coefficients, order


def pivot_columns(basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of a matrix that make all others with coefficients of at most 2.

    LU with partial pivoting finds the first set. While a coefficient t is larger, its column and
    its pivot change places, which multiplies the determinant of the pivots by |t|, so it ends
    (Gu and Eisenstat 1996).

    Args:
        basis: Shape (k, n), k < n, fp64. Where its rank is lower, rows are replaced.

    Returns:
        The order of the columns, pivots first and the rest ascending, shape (n,), and the
        coefficients T of shape (k, n - k): `basis[:, rest] = basis[:, pivots] T`.
    """
    rank, size = basis.shape
    factored, places, _ = torch.linalg.lu_factor_ex(basis.T)
    pivots = factored.diagonal().abs()
    if float(pivots.min()) <= 1e-12 * float(pivots.max()):
        factored, places, _ = torch.linalg.lu_factor_ex(torch.linalg.qr(basis.T).Q)
    swaps, lower, _ = torch.lu_unpack(factored, places)
    order = swaps.argmax(dim=0)
    found = torch.linalg.solve_triangular(
        lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True
    ).T.contiguous()
    while True:
        row, column = divmod(int(found.abs().argmax()), size - rank)
        if abs(float(found[row, column])) <= LARGEST_COEFFICIENT:
            break
        _exchange_(found, row, column)
        order[[row, rank + column]] = order[[rank + column, row]]
    rest, places = order[rank:].sort()
    return torch.cat((order[:rank], rest)), found[:, places]


def _exchange_(coefficients: torch.Tensor, row: int, column: int) -> None:
    """The coefficients after a pivot and another column change places, in place."""
    pivot = coefficients[row, column].clone()
    across, down = coefficients[row] / pivot, coefficients[:, column].clone()
    across[column] = 1 / pivot
    down[row] = 0
    coefficients.addr_(down, across, alpha=-1)
    coefficients[:, column] = -down / pivot
    coefficients[row] = across
