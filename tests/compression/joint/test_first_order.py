"""The first-order terms, tails and corrections against explicit formulas."""

import itertools

import pytest
import torch

from hf_lowrank.compression.gradients import retruncation_form
from hf_lowrank.compression.joint.first_order import (
    corrected_factors,
    first_order_terms,
    trusted_tails,
)
from hf_lowrank.decomposition.metrics import QuadraticForm, Side
from hf_lowrank.decomposition.moments import SecondMoment
from hf_lowrank.decomposition.spectrum import decompose
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.threshold import plan_for_scores


def full_form(m, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for size in (m, n):
        rows = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
        matrix = rows.T @ rows
        sides.append(Side(None, SecondMoment(matrix, float(matrix.trace()), size), 0.0))
    return QuadraticForm(*sides, price_scale=0.5)


def random_layer(m, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_first_order_terms_are_those_of_the_singular_vectors(shape):
    weight, gradient = random_layer(*shape)
    form = full_form(*shape)
    L = torch.linalg.cholesky(form.output.moment.matrix)
    R = torch.linalg.cholesky(form.input.moment.matrix)
    U, sigma, Vh = torch.linalg.svd(L.T @ weight @ R, full_matrices=False)
    inner = torch.linalg.solve(L, gradient) @ torch.linalg.inv(R).T
    expected = -sigma * (U * (inner @ Vh.T)).sum(0)
    found = first_order_terms(decompose(weight, form, dtype=torch.float64)[1], gradient)
    assert torch.allclose(found, expected, rtol=1e-8)


def test_first_order_terms_add_up_to_the_change_along_the_gradient():
    weight, gradient = random_layer(5, 7)
    _spectrum, factors = decompose(weight, full_form(5, 7), dtype=torch.float64)
    terms = first_order_terms(factors, gradient)
    for rank in range(5):
        error = factors.left[:, :rank] @ factors.right[:rank] - weight
        assert float(terms[rank:].sum()) == pytest.approx(float((gradient * error).sum()))


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
def test_trusted_tails_stay_within_their_share_of_the_prices(trust):
    price = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    linear = torch.tensor([0.1, -9.0, 0.2, -0.1], dtype=torch.float64)
    tails = trusted_tails(price, linear, trust)
    second = torch.tensor([7.5, 3.5, 1.5, 0.5, 0.0], dtype=torch.float64)
    first = torch.tensor([-8.8, -8.9, 0.1, -0.1, 0.0], dtype=torch.float64)
    assert (tails >= (1 - trust) * second - 1e-12).all()
    assert (tails <= (1 + trust) * second + 1e-12).all()
    free = first.abs() <= trust * second
    assert torch.allclose(tails[free], (second + first)[free])


def test_plans_on_signed_tails_are_the_best_on_their_hull():
    """Brute force over all ranks of two small layers, at every size that a hull corner has."""
    shapes = {"a": (6, 6), "b": (8, 8)}
    tails = {
        "a": torch.tensor([5.0, 2.0, -0.5, 0.0, 0.0, 0.0, 0.0]),
        "b": torch.tensor([9.0, 1.0, 0.5, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0]),
    }
    scores = {name: torch.linspace(1, 0.1, min(shape)) for name, shape in shapes.items()}

    def predicted(ranks):
        return sum(0.0 if r is None else float(tails[n][r]) for n, r in ranks.items())

    plans = [
        RankPlan({"a": a, "b": b}, shapes)
        for a, b in itertools.product([1, 2, None], [1, 2, 3, None])
    ]
    for wanted in ({"a": 1, "b": 1}, {"a": 2, "b": 1}):
        ratio = RankPlan(wanted, shapes).param_ratio
        found = plan_for_scores(shapes, scores, ratio, tails=tails)
        best = min(predicted(p.ranks) for p in plans if p.param_ratio <= ratio)
        assert predicted(found.ranks) == pytest.approx(best)


def test_a_correction_removes_the_part_of_the_error_along_the_gradient():
    weight, gradient = random_layer(6, 6, seed=4)
    _spectrum, factors = decompose(weight, QuadraticForm(), dtype=torch.float64)
    error = factors.left[:, :3] @ factors.right[:3] - weight
    gradient = gradient * torch.sign((gradient * error).sum())  # the error raises the loss
    moved = corrected_factors(weight, factors, 3, gradient, QuadraticForm(), 100.0)
    along, size = (gradient * error).sum(), gradient.square().sum()
    target = weight + error - along / size * gradient
    _, expected = decompose(target, QuadraticForm(), dtype=torch.float64)
    assert moved.left.shape == (6, 3)
    assert torch.allclose(moved.left @ moved.right, expected.left[:, :3] @ expected.right[:3])
    after = (gradient * (moved.left @ moved.right - weight)).sum()
    assert abs(float(after)) < abs(float(along))
    assert corrected_factors(weight, factors, 3, -gradient, QuadraticForm(), 1.0) is None


@pytest.mark.parametrize("largest", [1e-3, 1e-2])
def test_a_correction_stays_within_its_trust_region(largest):
    weight, gradient = random_layer(6, 6, seed=4)
    _spectrum, factors = decompose(weight, QuadraticForm(), dtype=torch.float64)
    truncated = factors.left[:, :3] @ factors.right[:3]
    gradient = gradient * torch.sign((gradient * (truncated - weight)).sum())
    moved = corrected_factors(weight, factors, 3, gradient, QuadraticForm(), largest)
    step = float((moved.left @ moved.right - truncated).norm() / weight.norm())
    assert largest / 10 < step <= 1.5 * largest


def test_only_sides_that_hold_for_any_weight_are_used_again():
    full = SecondMoment(torch.eye(3), 3.0, 3)
    images = SecondMoment(torch.eye(3), 5.0, 5)
    kept = retruncation_form(QuadraticForm(Side(moment=images), Side(moment=full)))
    assert kept == QuadraticForm(Side(), Side(moment=full))
