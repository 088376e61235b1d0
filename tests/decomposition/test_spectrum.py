"""Spectra against a direct fp64 SVD in numpy, and what must hold of any of them."""

import math

import numpy as np
import pytest
import torch

from hf_lowrank.decomposition.metrics import METRICS, MetricSettings, QuadraticForm, Side
from hf_lowrank.decomposition.moments import Moments, SecondMoment
from hf_lowrank.decomposition.spectrum import Spectrum, decompose, matrix_root
from hf_lowrank.errors import NumericalError

SHAPES = {"tall": (7, 4), "wide": (4, 7), "square": (5, 5)}
SETTINGS = MetricSettings(input_damping=0.05, output_damping=0.2, activation_alpha=0.7)
UNDAMPED = MetricSettings(input_damping=0.0, output_damping=0.0)
TOKENS, LOSSES = 40, 31

all_metrics = pytest.mark.parametrize("metric", sorted(METRICS))
all_shapes = pytest.mark.parametrize("shape", sorted(SHAPES))
both_kinds = pytest.mark.parametrize("projected", [False, True], ids=["full", "projected"])


class Layer:
    """A weight with inputs and gradients whose coordinates differ in scale."""

    def __init__(self, shape, tokens=TOKENS, seed=0):
        rng = np.random.default_rng(seed)
        m, n = SHAPES[shape]
        self.W = rng.normal(size=(m, n))
        self.x = rng.normal(size=(tokens, n)) @ rng.normal(size=(n, n)) * np.linspace(0.3, 2, n)
        self.g = rng.normal(size=(tokens, m)) @ rng.normal(size=(m, m)) * np.linspace(3, 0.2, m)
        self.rows = rng.uniform(0.1, 4.0, size=m)
        pruned = rng.uniform(size=(m, n)) < np.linspace(0.0, 0.6, m)[:, None]
        self.W[:, 1:][pruned[:, 1:]] = 0.0  # rows differ in their survivors; none is without

    @property
    def weight(self):
        return torch.from_numpy(self.W)

    def moments(self, projected=False):
        m, n = self.W.shape
        return Moments(
            input=second_moment(self.x, self.W.T if projected and n > m else None),
            input_centred=second_moment(
                self.x - self.x.mean(0), self.W.T if projected and n > m else None
            ),
            output=second_moment(self.g, self.W if projected and m > n else None),
            input_abs=torch.from_numpy(np.abs(self.x).sum(0)),
            gradient_rows=torch.from_numpy(self.rows),
            tokens=len(self.x),
            losses=LOSSES,
        )

    def form(self, metric, settings=SETTINGS, projected=False):
        return METRICS[metric].form(self.moments(projected), settings)

    def sides(self, metric, settings=SETTINGS):
        """`(P, Q)` as the papers have them."""
        m, n = self.W.shape
        P, Q = np.eye(m), np.eye(n)
        if metric == "fisher-rows":
            P = np.diag(self.rows + 1e-6 * self.rows.mean())
        if metric == "activation-scale":
            mean = np.abs(self.x).mean(0)
            root = np.diag((mean + 1e-6 * mean.mean()) ** settings.activation_alpha)
            Q = root @ root
        if metric in ("whitened", "kfac", "sparsity-whitened"):
            Q = damped(self.x.T @ self.x, settings.input_damping)
        if metric == "pooled":
            centred = self.x - self.x.mean(0)
            Q = damped(centred.T @ centred, settings.input_damping)
        if metric == "kfac":
            P = damped(self.g.T @ self.g, settings.output_damping)
        if metric.startswith("sparsity"):
            P = np.diag((self.W != 0).sum(axis=1).clip(1).astype(float))
        return P, Q


def second_moment(rows, image_by=None):
    images = rows if image_by is None else rows @ image_by
    squares = float((rows**2).sum())
    return SecondMoment(torch.from_numpy(images.T @ images), squares, rows.shape[1])


def damped(matrix, damping):
    return matrix + damping * np.mean(np.diag(matrix)) * np.eye(len(matrix))


def reference(W, P, Q):
    """`[W_1, ..., W_r]` and sigma by the SVD of `L^T W R`, mapped back by solves."""
    L, R = np.linalg.cholesky(P), np.linalg.cholesky(Q)
    U, sigma, Vt = np.linalg.svd(L.T @ W @ R, full_matrices=False)
    left = np.linalg.solve(L.T, U * sigma)
    right = np.linalg.solve(R.T, Vt.T).T
    return [left[:, :k] @ right[:k] for k in range(1, len(sigma) + 1)], sigma


def error_of(W_k, W, P, Q):
    D = W - W_k
    return float(np.trace(P @ D @ Q @ D.T))


def truncated(spectrum, rank):
    return (spectrum.left[:, :rank] @ spectrum.right[:rank]).double().numpy()


@all_metrics
@all_shapes
@both_kinds
def test_every_rank_equals_the_direct_svd(metric, shape, projected):
    layer = Layer(shape)
    form = layer.form(metric, projected=projected)
    spectrum = decompose(layer.weight, form, dtype=torch.float64)
    wanted, sigma = reference(layer.W, *layer.sides(metric))
    assert np.abs(wanted[0] - layer.W).max() > 0.1
    np.testing.assert_allclose(spectrum.sigma, sigma, rtol=1e-9)
    for rank, W_k in enumerate(wanted, start=1):
        np.testing.assert_allclose(truncated(spectrum, rank), W_k, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("metric", sorted(set(METRICS) - {"plain"}))
@all_shapes
def test_metrics_change_the_approximation(metric, shape):
    layer = Layer(shape)
    plain = decompose(layer.weight, QuadraticForm(), dtype=torch.float64)
    other = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    assert np.abs(truncated(plain, 2) - truncated(other, 2)).max() > 0.01


@all_shapes
@both_kinds
def test_a_component_costs_half_its_square_over_tokens_and_losses(shape, projected):
    layer = Layer(shape)
    spectrum = decompose(layer.weight, layer.form("kfac", projected=projected))
    _, sigma = reference(layer.W, *layer.sides("kfac"))
    np.testing.assert_allclose(spectrum.price, sigma**2 / (2 * TOKENS * LOSSES), rtol=1e-9)


@pytest.mark.parametrize("metric", sorted(set(METRICS) - {"kfac"}))
def test_other_metrics_have_no_price(metric):
    layer = Layer("tall")
    spectrum = decompose(layer.weight, layer.form(metric))
    assert spectrum.price is None
    assert math.isnan(spectrum.predicted_rise(1))
    assert spectrum.predicted_rise(None) == 0.0


def test_predicted_rise_adds_the_dropped_prices():
    layer = Layer("wide")
    spectrum = decompose(layer.weight, layer.form("kfac"))
    assert spectrum.predicted_rise(1) > spectrum.predicted_rise(2) > 0
    assert spectrum.predicted_rise(2) == pytest.approx(float(spectrum.price[2] + spectrum.price[3]))
    assert spectrum.predicted_rise(4) == 0.0
    assert spectrum.predicted_rise(None) == 0.0


@all_metrics
@all_shapes
def test_the_error_is_the_sum_of_the_dropped_squares(metric, shape):
    layer = Layer(shape)
    P, Q = layer.sides(metric)
    spectrum = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    for rank in range(1, len(spectrum.sigma)):
        dropped = float((spectrum.sigma[rank:] ** 2).sum())
        assert dropped > 1e-6
        assert error_of(truncated(spectrum, rank), layer.W, P, Q) == pytest.approx(dropped)


@all_metrics
@all_shapes
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_perturbed_factors_of_the_same_rank_do_better(metric, shape, rank):
    """Eckart-Young-Mirsky in the metric."""
    layer = Layer(shape)
    P, Q = layer.sides(metric)
    spectrum = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    left, right = spectrum.left[:, :rank].numpy(), spectrum.right[:rank].numpy()
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
    little = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    much = decompose(layer.weight, larger.form(metric), dtype=torch.float64)
    none = decompose(layer.weight, layer.form(metric, UNDAMPED), dtype=torch.float64)
    assert np.abs(truncated(little, 2) - truncated(none, 2)).max() > 1e-4
    np.testing.assert_allclose(truncated(little, 2), truncated(much, 2), rtol=1e-8)


@pytest.mark.parametrize("metric", ["whitened", "kfac"])
@all_shapes
@both_kinds
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_singular_moments_are_exact_on_the_directions_seen(metric, shape, projected, tokens):
    layer = Layer(shape, tokens=tokens)
    form = layer.form(metric, UNDAMPED, projected)
    spectrum = decompose(layer.weight, form, dtype=torch.float64)
    size = min(layer.W.shape)
    assert spectrum.left.shape == (layer.W.shape[0], size)
    assert spectrum.right.shape == (size, layer.W.shape[1])
    assert spectrum.left.isfinite().all()
    assert spectrum.right.isfinite().all()
    assert spectrum.sigma[tokens - 1] > 1e-3 * spectrum.sigma[0]
    assert spectrum.sigma[tokens:].max() < 1e-6 * spectrum.sigma[0]
    seen_gap = (truncated(spectrum, size) - layer.W) @ layer.x.T
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
    spectrum = decompose(layer.weight, form, dtype=torch.float64)
    np.testing.assert_allclose(spectrum.sigma, sigma, rtol=1e-6, atol=1e-6 * sigma[0])
    for rank in (1, 2):
        least = float((sigma[rank:] ** 2).sum())
        assert least > 1e-6
        found = error_of(truncated(spectrum, rank), layer.W, P, Q)
        assert found == pytest.approx(least, rel=1e-6)


def symmetric_root(form):
    values, vectors = np.linalg.eigh(form)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def test_directions_that_were_never_seen_cost_nothing():
    layer = Layer("square", tokens=2)
    spectrum = decompose(layer.weight, layer.form("kfac", UNDAMPED))
    assert spectrum.price.shape == (5,)
    assert spectrum.price[1] > 0
    assert spectrum.predicted_rise(2) < 1e-12 * spectrum.predicted_rise(0)


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


@pytest.mark.parametrize("metric", ["fisher-rows", "activation-scale"])
@all_shapes
def test_a_diagonal_of_zeros_never_gives_factors_that_are_not_finite(metric, shape):
    """A layer that calibration left untouched: refused, or factorized without NaN."""
    layer = Layer(shape)
    layer.x, layer.rows = 0 * layer.x, 0 * layer.rows
    try:
        spectrum = decompose(layer.weight, layer.form(metric))
    except NumericalError:
        return
    assert spectrum.left.isfinite().all()
    assert spectrum.right.isfinite().all()


@pytest.mark.parametrize("metric", ["fisher-rows", "activation-scale"])
@all_shapes
def test_a_single_zero_on_the_diagonal_loses_no_row_or_column(metric, shape):
    layer = Layer(shape)
    layer.x[:, 1], layer.rows[1] = 0, 0
    spectrum = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    np.testing.assert_allclose(truncated(spectrum, 7), layer.W, atol=1e-9)


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


def test_a_weight_of_zeros_has_zero_factors():
    spectrum = decompose(torch.zeros(4, 3), QuadraticForm())
    assert spectrum.sigma.tolist() == [0.0, 0.0, 0.0]
    A, B = spectrum.factors(2)
    assert A.isfinite().all()
    assert torch.equal(B @ A, torch.zeros(4, 3))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1)])
def test_a_single_row_or_column_is_exact_at_rank_one(shape):
    weight = torch.arange(1.0, 1 + max(shape)).view(shape)
    spectrum = decompose(weight, QuadraticForm())
    assert spectrum.sigma.tolist() == pytest.approx([float(weight.norm())])
    assert torch.allclose(spectrum.left @ spectrum.right, weight)


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
    spectrum = decompose(weight, layer.form("kfac"))
    _, sigma = reference(weight.double().numpy(), *layer.sides("kfac"))
    np.testing.assert_allclose(spectrum.sigma, sigma, rtol=1e-9)
    assert spectrum.sigma.dtype == spectrum.price.dtype == torch.float64
    assert spectrum.left.dtype == spectrum.right.dtype == torch.float32
    assert torch.allclose(spectrum.left @ spectrum.right, weight.float(), atol=1e-5)


@all_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_kept_in_the_wanted_type_and_contiguous(shape, dtype):
    spectrum = decompose(Layer(shape).weight, QuadraticForm(), dtype=dtype)
    for factor in (spectrum.left, spectrum.right):
        assert factor.dtype == dtype
        assert factor.is_contiguous()
    assert spectrum.shape == SHAPES[shape]


@all_metrics
@all_shapes
@pytest.mark.parametrize("rank", [1, 3])
def test_factors_multiply_to_the_truncated_weight_and_share_its_scale(metric, shape, rank):
    layer = Layer(shape)
    spectrum = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    A, B = spectrum.factors(rank)
    m, n = layer.W.shape
    assert (A.shape, B.shape) == ((rank, n), (m, rank))
    np.testing.assert_allclose((B @ A).numpy(), truncated(spectrum, rank), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-9)
    assert A.norm(dim=1).min() > 0.01


def test_factors_of_unseen_directions_are_finite():
    layer = Layer("tall", tokens=1)
    spectrum = decompose(layer.weight, layer.form("whitened", UNDAMPED))
    A, B = spectrum.factors(4)
    assert A.isfinite().all()
    assert B.isfinite().all()
    assert torch.allclose(B @ A, spectrum.left @ spectrum.right, atol=1e-6)


def test_factors_with_a_vanishing_half_are_finite():
    left, right = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    spectrum = Spectrum(left, right, torch.tensor([1.0, 0.0]).double(), None)
    A, B = spectrum.factors(2)
    assert A.isfinite().all()
    assert torch.allclose(B @ A, left @ right)


def test_root_of_a_definite_form_is_triangular():
    form = torch.from_numpy(damped(np.cov(Layer("tall").x.T), 0.1))
    root = matrix_root(form)
    assert torch.equal(root, root.tril())
    assert torch.allclose(root @ root.T, form, rtol=1e-12)


def test_root_of_a_low_precision_form_is_computed_in_fp64():
    form = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    root = matrix_root(form)
    assert root.dtype == torch.float64
    assert torch.allclose(root @ root.T, form.double(), rtol=1e-15)


def test_root_of_a_singular_form_has_its_rank():
    rows = torch.from_numpy(Layer("wide", tokens=3).x)
    form = rows.T @ rows
    root = matrix_root(form)
    assert root.shape == (7, 3)
    assert torch.allclose(root @ root.T, form, atol=1e-9 * float(form.max()))


@pytest.mark.parametrize(("second", "kept"), [(2e-10, 2), (0.5e-10, 1)])
def test_root_drops_eigenvalues_under_a_ten_billionth_of_the_largest(second, kept):
    form = 7.0 * torch.diag(torch.tensor([second, 1.0, -1e-12], dtype=torch.float64))
    root = matrix_root(form)
    assert root.shape == (3, kept)
    assert float((root @ root.T)[1, 1]) == pytest.approx(7.0)


@pytest.mark.parametrize("scale", [1.0, 1e-13])
@pytest.mark.parametrize(("diagonal", "kept"), [((1.0, 0.5, 0.0), 2), ((0.0, 1.0, 0.0), 1)])
def test_root_of_a_singular_form_does_not_depend_on_its_scale(scale, diagonal, kept):
    form = scale * torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    root = matrix_root(form)
    assert root.shape == (3, kept)
    assert torch.allclose(root @ root.T, form, rtol=1e-9, atol=0)


@pytest.mark.parametrize("diagonal", [(0.0, 0.0), (-1.0, -2.0), (0.0, -1.0)])
def test_root_of_a_form_without_positive_eigenvalue_is_refused(diagonal):
    with pytest.raises(NumericalError, match=r"^a second moment has no positive eigenvalue$"):
        matrix_root(torch.diag(torch.tensor(diagonal)))


def test_a_side_without_form_is_the_identity():
    assert Side() == Side(diagonal=None, moment=None, damping=0.0)
    W = Layer("wide").W
    spectrum = decompose(torch.from_numpy(W), QuadraticForm(), dtype=torch.float64)
    np.testing.assert_allclose(spectrum.sigma, np.linalg.svd(W, compute_uv=False), rtol=1e-9)


def test_diagonal_and_moment_sides_mix():
    layer = Layer("tall")
    rows = torch.from_numpy(layer.rows)
    form = QuadraticForm(Side(diagonal=rows), Side(moment=layer.moments().input, damping=0.3))
    wanted, _ = reference(layer.W, np.diag(layer.rows), damped(layer.x.T @ layer.x, 0.3))
    spectrum = decompose(layer.weight, form, dtype=torch.float64)
    np.testing.assert_allclose(truncated(spectrum, 2), wanted[1], rtol=1e-8)


@pytest.mark.parametrize("metric", ["sparsity", "sparsity-whitened"])
@all_shapes
def test_rows_without_survivors_stay_zero(metric, shape):
    layer = Layer(shape)
    layer.W[1] = 0.0
    spectrum = decompose(layer.weight, layer.form(metric), dtype=torch.float64)
    wanted, _ = reference(layer.W, *layer.sides(metric))
    for rank in (1, 2):
        found = truncated(spectrum, rank)
        np.testing.assert_allclose(found, wanted[rank - 1], rtol=1e-8, atol=1e-9)
        assert np.abs(found[1]).max() < 1e-12


@pytest.mark.parametrize("metric", ["sparsity", "sparsity-whitened"])
@all_shapes
def test_a_matrix_without_survivors_gives_finite_factors(metric, shape):
    layer = Layer(shape)
    layer.W[:] = 0.0
    factors = decompose(layer.weight, layer.form(metric)).factors(2)
    assert all(bool(torch.isfinite(factor).all()) for factor in factors)
    assert not bool((factors[1] @ factors[0]).any())


def test_on_a_dense_weight_sparsity_is_plain():
    weight = torch.from_numpy(np.random.default_rng(3).normal(size=(6, 4)))
    plain = decompose(weight, QuadraticForm(), dtype=torch.float64)
    other = decompose(weight, QuadraticForm(Side(survivors=True)), dtype=torch.float64)
    np.testing.assert_allclose(truncated(other, 2), truncated(plain, 2), atol=1e-9)
    np.testing.assert_allclose(other.sigma, plain.sigma * 4**0.5, rtol=1e-9)
