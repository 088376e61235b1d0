"""Spectra of singular, zero and non-finite weights and moments."""

import math

import numpy as np
import pytest
import torch

from hf_lowrank.decomposition.metrics import METRICS, QuadraticForm, Side
from hf_lowrank.decomposition.spectrum import Factors, decompose
from hf_lowrank.errors import NumericalError
from tests.decomposition import (
    SETTINGS,
    UNDAMPED,
    Layer,
    all_shapes,
    both_kinds,
    error_of,
    reference,
    truncated,
)


@pytest.mark.parametrize("metric", ["whitened", "kfac"])
@all_shapes
@both_kinds
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_singular_moments_are_exact_on_the_directions_seen(metric, shape, projected, tokens):
    layer = Layer(shape, tokens=tokens)
    form = layer.form(metric, UNDAMPED, projected)
    spectrum, factors = decompose(layer.weight, form, dtype=torch.float64)
    size = min(layer.W.shape)
    assert factors.left.shape == (layer.W.shape[0], size)
    assert factors.right.shape == (size, layer.W.shape[1])
    assert factors.left.isfinite().all()
    assert factors.right.isfinite().all()
    assert spectrum.sigma[tokens - 1] > 1e-3 * spectrum.sigma[0]
    assert spectrum.sigma[tokens:].max() < 1e-6 * spectrum.sigma[0]
    seen_gap = (truncated(factors, size) - layer.W) @ layer.x.T
    if metric == "kfac":
        seen_gap = layer.g @ seen_gap
    assert np.abs(layer.W @ layer.x.T).max() > 0.1
    assert np.abs(seen_gap).max() < 1e-6 * np.abs(layer.W).max() * np.abs(layer.x).max() * max(
        1, np.abs(layer.g).max()
    )


@pytest.mark.parametrize("metric", ["whitened", "kfac"])
@all_shapes
@both_kinds
def test_singular_moments_leave_the_least_possible_error(metric, shape, projected):
    """Against symmetric roots, which exist for singular moments too."""
    layer = Layer(shape, tokens=3, seed=4)
    P, Q = layer.sides(metric, UNDAMPED)
    sigma = np.linalg.svd(symmetric_root(P) @ layer.W @ symmetric_root(Q), compute_uv=False)
    form = layer.form(metric, UNDAMPED, projected)
    spectrum, factors = decompose(layer.weight, form, dtype=torch.float64)
    np.testing.assert_allclose(spectrum.sigma, sigma, rtol=1e-6, atol=1e-6 * sigma[0])
    for rank in (1, 2):
        least = float((sigma[rank:] ** 2).sum())
        assert least > 1e-6
        found = error_of(truncated(factors, rank), layer.W, P, Q)
        assert found == pytest.approx(least, rel=1e-6)


def symmetric_root(form):
    values, vectors = np.linalg.eigh(form)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def test_directions_that_were_never_seen_cost_nothing():
    layer = Layer("square", tokens=2)
    spectrum, _factors = decompose(layer.weight, layer.form("kfac", UNDAMPED))
    assert spectrum.price.shape == (5,)
    assert spectrum.price[1] > 0
    assert spectrum.predicted_rise(2) < 1e-12 * spectrum.predicted_rise(0)


def test_factors_of_unseen_directions_are_finite():
    layer = Layer("tall", tokens=1)
    _spectrum, factors = decompose(layer.weight, layer.form("whitened", UNDAMPED))
    A, B = factors.balanced(4)
    assert A.isfinite().all()
    assert B.isfinite().all()
    assert torch.allclose(B @ A, factors.left @ factors.right, atol=1e-6)


def test_factors_with_a_vanishing_half_are_finite():
    left, right = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    A, B = Factors(left, right).balanced(2)
    assert A.isfinite().all()
    assert torch.allclose(B @ A, left @ right)


@pytest.mark.parametrize("metric", ["fisher-rows", "activation-scale"])
@all_shapes
def test_a_single_zero_on_the_diagonal_loses_no_row_or_column(metric, shape):
    layer = Layer(shape)
    layer.x[:, 1], layer.rows[1] = 0, 0
    _spectrum, factors = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    np.testing.assert_allclose(truncated(factors, 7), layer.W, atol=1e-9)


@pytest.mark.parametrize("metric", ["fisher-rows", "activation-scale"])
@all_shapes
def test_a_diagonal_of_zeros_never_gives_factors_that_are_not_finite(metric, shape):
    """A layer that calibration left untouched: refused, or factorized without NaN."""
    layer = Layer(shape)
    layer.x, layer.rows = 0 * layer.x, 0 * layer.rows
    try:
        _spectrum, factors = decompose(layer.weight, layer.form(metric))
    except NumericalError:
        return
    assert factors.left.isfinite().all()
    assert factors.right.isfinite().all()


@pytest.mark.parametrize("metric", ["sparsity", "sparsity-whitened"])
@all_shapes
def test_rows_without_survivors_stay_zero(metric, shape):
    layer = Layer(shape)
    layer.W[1] = 0.0
    _spectrum, factors = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    wanted, _ = reference(layer.W, *layer.sides(metric))
    for rank in (1, 2):
        found = truncated(factors, rank)
        np.testing.assert_allclose(found, wanted[rank - 1], rtol=1e-8, atol=1e-9)
        assert np.abs(found[1]).max() < 1e-12


@pytest.mark.parametrize("metric", ["sparsity", "sparsity-whitened"])
@all_shapes
def test_a_matrix_without_survivors_gives_finite_factors(metric, shape):
    layer = Layer(shape)
    layer.W[:] = 0.0
    _, found = decompose(layer.weight, layer.form(metric))
    factors = found.balanced(2)
    assert all(bool(torch.isfinite(factor).all()) for factor in factors)
    assert not bool((factors[1] @ factors[0]).any())


def test_a_weight_of_zeros_has_zero_factors():
    spectrum, factors = decompose(torch.zeros(4, 3), QuadraticForm())
    assert spectrum.sigma.tolist() == [0.0, 0.0, 0.0]
    A, B = factors.balanced(2)
    assert A.isfinite().all()
    assert torch.equal(B @ A, torch.zeros(4, 3))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1)])
def test_a_single_row_or_column_is_exact_at_rank_one(shape):
    weight = torch.arange(1.0, 1 + max(shape)).view(shape)
    spectrum, factors = decompose(weight, QuadraticForm())
    assert spectrum.sigma.tolist() == pytest.approx([float(weight.norm())])
    assert torch.allclose(factors.left @ factors.right, weight)


# Refusals


@all_shapes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(shape, bad):
    weight = Layer(shape).weight
    weight[1, 2] = bad
    with pytest.raises(NumericalError, match=r"^the weight holds NaN or infinity$"):
        decompose(weight, QuadraticForm())


@pytest.mark.parametrize("side", ["input", "output"])
@all_shapes
@both_kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_moment_that_is_not_finite_is_refused(side, shape, projected, bad):
    layer = Layer(shape)
    moments = layer.moments(projected)
    getattr(moments, side).matrix[2, 1] = bad
    form = METRICS["kfac"].form(moments, SETTINGS)
    with pytest.raises(NumericalError, match=r"^the second moment holds NaN or infinity$"):
        decompose(layer.weight, form)


@pytest.mark.parametrize("metric", ["fisher-rows", "activation-scale"])
@all_shapes
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diagonal_that_is_not_finite_is_refused(metric, shape, bad):
    layer = Layer(shape)
    moments = layer.moments()
    (moments.gradient_rows if metric == "fisher-rows" else moments.input_abs)[1] = bad
    with pytest.raises(NumericalError, match=r"^the diagonal holds NaN or infinity$"):
        decompose(layer.weight, METRICS[metric].form(moments, SETTINGS))


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_a_diagonal_that_is_not_positive_is_refused(bad):
    form = QuadraticForm(input=Side(torch.tensor([1.0, bad, bad], dtype=torch.float64)))
    with pytest.raises(NumericalError, match=r"^2 entries of the diagonal are not positive$"):
        decompose(torch.ones(5, 3, dtype=torch.float64), form)


def test_a_zero_moment_is_refused():
    layer = Layer("tall")
    layer.x = 0 * layer.x
    with pytest.raises(NumericalError, match=r"^a second moment has no positive eigenvalue$"):
        decompose(layer.weight, layer.form("whitened"))


def test_a_failing_eigenvalue_solver_is_named(monkeypatch):
    def fail(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    message = r"^the eigenvalue solver failed \(did not converge\)$"
    with pytest.raises(NumericalError, match=message):
        decompose(Layer("tall").weight, QuadraticForm())


def test_eigenvalues_that_are_not_finite_are_refused(monkeypatch):
    def broken(matrix):
        return torch.full_like(matrix[0], math.nan), torch.eye(len(matrix)).to(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.raises(NumericalError, match=r"^the eigenvalue solver returned NaN or infinity$"):
        decompose(Layer("tall").weight, QuadraticForm())
