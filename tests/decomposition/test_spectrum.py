"""Spectra against a direct fp64 SVD in numpy, and what must hold of any of them."""

import math

import numpy as np
import pytest
import torch

from hf_lowrank.decomposition.metrics import METRICS, QuadraticForm, Side
from hf_lowrank.decomposition.spectrum import decompose
from tests.decomposition import (
    LOSSES,
    SETTINGS,
    SHAPES,
    TOKENS,
    UNDAMPED,
    Layer,
    all_metrics,
    all_shapes,
    both_kinds,
    damped,
    error_of,
    reference,
    truncated,
)


@all_metrics
@all_shapes
@both_kinds
def test_every_rank_equals_the_direct_svd(metric, shape, projected):
    layer = Layer(shape)
    form = layer.form(metric, projected=projected)
    spectrum, factors = decompose(layer.weight, form, dtype=torch.float64)
    wanted, sigma = reference(layer.W, *layer.sides(metric))
    assert np.abs(wanted[0] - layer.W).max() > 0.1
    np.testing.assert_allclose(spectrum.sigma, sigma, rtol=1e-9)
    for rank, W_k in enumerate(wanted, start=1):
        np.testing.assert_allclose(truncated(factors, rank), W_k, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("metric", sorted(set(METRICS) - {"plain"}))
@all_shapes
def test_metrics_change_the_approximation(metric, shape):
    layer = Layer(shape)
    _, plain = decompose(layer.weight, QuadraticForm(), dtype=torch.float64)
    _, other = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    assert np.abs(truncated(plain, 2) - truncated(other, 2)).max() > 0.01


@all_shapes
@both_kinds
def test_a_component_costs_half_its_square_over_tokens_and_losses(shape, projected):
    layer = Layer(shape)
    spectrum, _factors = decompose(layer.weight, layer.form("kfac", projected=projected))
    _, sigma = reference(layer.W, *layer.sides("kfac"))
    np.testing.assert_allclose(spectrum.price, sigma**2 / (2 * TOKENS * LOSSES), rtol=1e-9)


@pytest.mark.parametrize("metric", sorted(set(METRICS) - {"kfac"}))
def test_other_metrics_have_no_price(metric):
    layer = Layer("tall")
    spectrum, _factors = decompose(layer.weight, layer.form(metric))
    assert spectrum.price is None
    assert math.isnan(spectrum.predicted_rise(1))
    assert spectrum.predicted_rise(None) == 0.0


def test_predicted_rise_adds_the_dropped_prices():
    layer = Layer("wide")
    spectrum, _factors = decompose(layer.weight, layer.form("kfac"))
    assert spectrum.predicted_rise(1) > spectrum.predicted_rise(2) > 0
    assert spectrum.predicted_rise(2) == pytest.approx(float(spectrum.price[2] + spectrum.price[3]))
    assert spectrum.predicted_rise(4) == 0.0
    assert spectrum.predicted_rise(None) == 0.0


@all_metrics
@all_shapes
def test_the_error_is_the_sum_of_the_dropped_squares(metric, shape):
    layer = Layer(shape)
    P, Q = layer.sides(metric)
    spectrum, factors = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    for rank in range(1, len(spectrum.sigma)):
        dropped = float((spectrum.sigma[rank:] ** 2).sum())
        assert dropped > 1e-6
        assert error_of(truncated(factors, rank), layer.W, P, Q) == pytest.approx(dropped)


@all_metrics
@all_shapes
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_perturbed_factors_of_the_same_rank_do_better(metric, shape, rank):
    """Eckart-Young-Mirsky in the metric."""
    layer = Layer(shape)
    P, Q = layer.sides(metric)
    _spectrum, factors = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    left, right = factors.left[:, :rank].numpy(), factors.right[:rank].numpy()
    best = error_of(left @ right, layer.W, P, Q)
    rng = np.random.default_rng(1)
    for scale in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(25):
            other_left = left + scale * np.abs(left).mean() * rng.normal(size=left.shape)
            other_right = right + scale * np.abs(right).mean() * rng.normal(size=right.shape)
            assert error_of(other_left @ other_right, layer.W, P, Q) > best


@pytest.mark.parametrize("metric", ["whitened", "kfac"])
@all_shapes
def test_damping_is_relative_to_the_moment(metric, shape):
    layer, larger = Layer(shape), Layer(shape)
    larger.x, larger.g = 100 * larger.x, 0.01 * larger.g
    _, little = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    _, much = decompose(layer.weight, larger.form(metric), dtype=torch.float64)
    _, none = decompose(layer.weight, layer.form(metric, UNDAMPED), dtype=torch.float64)
    assert np.abs(truncated(little, 2) - truncated(none, 2)).max() > 1e-4
    np.testing.assert_allclose(truncated(little, 2), truncated(much, 2), rtol=1e-8)


@all_shapes
def test_the_weight_is_left_alone(shape):
    layer = Layer(shape)
    moments = layer.moments()
    before = layer.W.copy(), moments.input.matrix.clone(), moments.output.matrix.clone()
    decompose(layer.weight, METRICS["kfac"].form(moments, SETTINGS))
    assert np.array_equal(layer.W, before[0])
    assert torch.equal(moments.input.matrix, before[1])
    assert torch.equal(moments.output.matrix, before[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@all_shapes
def test_weights_of_low_precision_are_decomposed_in_fp64(dtype, shape):
    layer = Layer(shape)
    weight = layer.weight.to(dtype)
    spectrum, factors = decompose(weight, layer.form("kfac"))
    _, sigma = reference(weight.double().numpy(), *layer.sides("kfac"))
    np.testing.assert_allclose(spectrum.sigma, sigma, rtol=1e-9)
    assert spectrum.sigma.dtype == spectrum.price.dtype == torch.float64
    assert factors.left.dtype == factors.right.dtype == torch.float32
    assert torch.allclose(factors.left @ factors.right, weight.float(), atol=1e-5)


@all_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_kept_in_the_wanted_type_and_contiguous(shape, dtype):
    spectrum, factors = decompose(Layer(shape).weight, QuadraticForm(), dtype=dtype)
    for factor in (factors.left, factors.right):
        assert factor.dtype == dtype
        assert factor.is_contiguous()
    assert spectrum.shape == SHAPES[shape]


@all_metrics
@all_shapes
@pytest.mark.parametrize("rank", [1, 3])
def test_factors_multiply_to_the_truncated_weight_and_share_its_scale(metric, shape, rank):
    layer = Layer(shape)
    _spectrum, factors = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    A, B = factors.balanced(rank)
    m, n = layer.W.shape
    assert (A.shape, B.shape) == ((rank, n), (m, rank))
    np.testing.assert_allclose((B @ A).numpy(), truncated(factors, rank), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-9)
    assert A.norm(dim=1).min() > 0.01


def test_a_side_without_form_is_the_identity():
    assert Side() == Side(diagonal=None, moment=None, damping=0.0)
    W = Layer("wide").W
    spectrum, _factors = decompose(torch.from_numpy(W), QuadraticForm(), dtype=torch.float64)
    np.testing.assert_allclose(spectrum.sigma, np.linalg.svd(W, compute_uv=False), rtol=1e-9)


def test_diagonal_and_moment_sides_mix():
    layer = Layer("tall")
    rows = torch.from_numpy(layer.rows)
    form = QuadraticForm(Side(diagonal=rows), Side(moment=layer.moments().input, damping=0.3))
    wanted, _ = reference(layer.W, np.diag(layer.rows), damped(layer.x.T @ layer.x, 0.3))
    _spectrum, factors = decompose(layer.weight, form, dtype=torch.float64)
    np.testing.assert_allclose(truncated(factors, 2), wanted[1], rtol=1e-8)


def test_on_a_dense_weight_sparsity_is_plain():
    weight = torch.from_numpy(np.random.default_rng(3).normal(size=(6, 4)))
    plain, plain_factors = decompose(weight, QuadraticForm(), dtype=torch.float64)
    other, factors = decompose(weight, QuadraticForm(Side(survivors=True)), dtype=torch.float64)
    np.testing.assert_allclose(truncated(factors, 2), truncated(plain_factors, 2), atol=1e-9)
    np.testing.assert_allclose(other.sigma, plain.sigma * 4**0.5, rtol=1e-9)
