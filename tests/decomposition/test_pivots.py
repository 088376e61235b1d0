"""Pivot columns, and the compact form that is fitted to a weight in the metric."""

import pytest
import torch

from hf_lowrank.decomposition.metrics import QuadraticForm, Side
from hf_lowrank.decomposition.moments import SecondMoment
from hf_lowrank.decomposition.pivots import LARGEST_COEFFICIENT, compact_columns, pivot_columns
from hf_lowrank.decomposition.spectrum import decompose
from hf_lowrank.errors import NumericalError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rebuilt(pivots, coefficients, order):
    weight = torch.empty(len(pivots), len(order), dtype=torch.float64)
    weight[:, order] = torch.cat((pivots, pivots @ coefficients), dim=1)
    return weight


def kahan(size, angle=1.2):
    """A matrix on which pivoting by columns finds bad pivots."""
    powers = torch.sin(torch.tensor(angle)) ** torch.arange(size, dtype=torch.float64)
    upper = torch.eye(size, dtype=torch.float64) - torch.cos(torch.tensor(angle)) * torch.ones(
        size, size, dtype=torch.float64
    ).triu(1)
    return powers[:, None] * upper


def test_coefficients_are_bounded_and_exact_on_random_matrices():
    for seed in range(200):
        rank, size = 1 + seed % 12, 13 + seed % 7
        basis = random(rank, size, seed=seed) * torch.logspace(0, -3, size, dtype=torch.float64)
        order, coefficients = pivot_columns(basis)
        assert coefficients.abs().max() <= LARGEST_COEFFICIENT
        assert order.sort().values.tolist() == list(range(size))
        assert order[rank:].tolist() == sorted(order[rank:].tolist())
        scale = float(basis.norm())
        found = basis[:, order[:rank]] @ coefficients
        torch.testing.assert_close(found, basis[:, order[rank:]], rtol=0, atol=1e-9 * scale)


def test_a_matrix_made_against_pivoting_gets_bounded_coefficients():
    """Rows of Wilkinson's kind, on which LU with partial pivoting grows by 2 with every row."""
    lower = torch.eye(24, dtype=torch.float64) - torch.ones(24, 24, dtype=torch.float64).tril(-1)
    lower[:, -1] = 1.0
    wilkinson = lower[:, :12].T.contiguous()
    # The column that has to change places is not the first of the rest.
    parted = torch.cat((wilkinson[:, :12], 1e-3 * random(12, 5), wilkinson[:, 12:]), dim=1)
    for hard in (wilkinson, parted, kahan(24)[:12]):
        order, coefficients = pivot_columns(hard)
        assert coefficients.abs().max() <= LARGEST_COEFFICIENT
        found = hard[:, order[:12]] @ coefficients
        torch.testing.assert_close(found, hard[:, order[12:]], rtol=1e-8, atol=1e-8)


def metric_case(rows, columns):
    """A weight, its spectrum and factors in a random metric, and the root of the inputs' moment."""
    weight = random(rows, columns)
    inputs, outputs = random(columns, columns, seed=1), random(rows, rows, seed=2)
    moments = [SecondMoment(x @ x.T, float((x @ x.T).trace()), len(x)) for x in (inputs, outputs)]
    form = QuadraticForm(Side(moment=moments[1]), Side(moment=moments[0]), 1.0)
    factors = decompose(weight, form, dtype=torch.float64)[1]
    return weight, factors, torch.linalg.cholesky(inputs @ inputs.T)


@pytest.mark.parametrize("shape", [(9, 6), (6, 6)])
def test_in_full_precision_it_is_the_best_approximation(shape):
    _, factors, _ = metric_case(*shape)
    for rank in range(1, shape[1]):
        found = compact_columns(factors.left, factors.right, rank, torch.float64)
        torch.testing.assert_close(rebuilt(*found), factors.product(rank), rtol=1e-6, atol=1e-6)


def test_pivots_are_fitted_to_the_weight_in_the_metric_after_rounding():
    """No other pivots are better with the rounded coefficients: the gradient is zero."""
    weight, factors, root = metric_case(9, 6)
    pivots, coefficients, order = compact_columns(factors.left, factors.right, 4, torch.bfloat16)
    assert torch.equal(coefficients, coefficients.to(torch.bfloat16).double())
    rows = torch.cat((torch.eye(4, dtype=torch.float64), coefficients), 1)[:, order.argsort()]
    left_over = (weight - rebuilt(pivots, coefficients, order)) @ root
    gradient = left_over @ (rows @ root).T
    assert gradient.abs().max() < 1e-8 * float(weight.norm() * root.norm() ** 2)


@pytest.mark.parametrize("rank", [2, 4, 5])
def test_a_product_of_lower_rank_is_rebuilt(rank):
    left, right = random(8, 6), random(6, 6, seed=3)
    left[:, 3:], right[3:] = 0, 0
    found = compact_columns(left, right, rank, torch.float64)
    wanted = left[:, :rank] @ right[:rank]
    torch.testing.assert_close(rebuilt(*found), wanted, rtol=1e-8, atol=1e-8)
    assert found[1].abs().max() <= LARGEST_COEFFICIENT


def test_fewer_components_than_columns_are_fitted_to_their_product():
    left, right = random(8, 3), random(3, 6, seed=3)
    found = compact_columns(left, right, 3, torch.float64)
    torch.testing.assert_close(rebuilt(*found), left @ right, rtol=1e-8, atol=1e-8)


def test_a_metric_without_a_usable_inverse_is_fitted_to_the_product():
    """The inverse can be computed, and its square has no root any more."""
    left, right = random(8, 6), random(6, 6, seed=3)
    right[4] = right[0] + 1e-13 * right[4]
    right[5] = right[1] + 1e-13 * right[5]
    found = compact_columns(left, right, 5, torch.float64)
    wanted = left[:, :5] @ right[:5]
    torch.testing.assert_close(rebuilt(*found), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_factors_that_are_not_finite_are_refused(bad, side):
    factors = [random(8, 6), random(6, 6, seed=3)]
    factors[side][2, 3] = bad
    with pytest.raises(NumericalError, match=r"^the factor holds NaN or infinity$"):
        compact_columns(*factors, 3, torch.float64)
