"""The penalties against explicit formulas, and their gradients."""

import pytest
import torch

from hf_lowrank.errors import ConfigError
from hf_lowrank.format.forms.factors import LowRankLinear
from hf_lowrank.training.penalties import orthogonality_penalty, rank_penalty
from tests.training import training_layer


def odd_layers() -> list[LowRankLinear]:
    """Two layers of different ranks, far from orthonormal, with spectra of both signs."""
    layers = [training_layer(7, 5, 4, seed=0), training_layer(6, 9, 3, seed=1)]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
            layer.lowrank_s[1] = -0.8
    return [layer.double() for layer in layers]


def test_orthogonality_is_the_formula():
    layers = odd_layers()
    expected = 0.0
    for layer in layers:
        U, V, k = layer.lowrank_B.weight.detach(), layer.lowrank_A.weight.detach(), layer.rank
        for i in range(k):
            for j in range(k):
                expected += float(U[:, i] @ U[:, j] - float(i == j)) ** 2 / k**2
                expected += float(V[i] @ V[j] - float(i == j)) ** 2 / k**2
    assert expected > 0.5
    assert orthogonality_penalty(layers).item() == pytest.approx(expected, rel=1e-12)


def test_orthonormal_factors_cost_nothing():
    assert orthogonality_penalty([training_layer()]).item() < 1e-10


def test_the_gradient_of_orthogonality_is_the_formula():
    layers = odd_layers()
    orthogonality_penalty(layers).backward()
    for layer in layers:
        U, V, k = layer.lowrank_B.weight, layer.lowrank_A.weight, layer.rank
        eye = torch.eye(k, dtype=torch.float64)
        expected_u = 4 * U @ (U.T @ U - eye) / k**2
        expected_v = 4 * (V @ V.T - eye) @ V / k**2
        torch.testing.assert_close(U.grad, expected_u.detach())
        torch.testing.assert_close(V.grad, expected_v.detach())
        assert layer.lowrank_s.grad is None


def test_rank_penalties_are_the_formulas():
    layers = odd_layers()
    spectra = [layer.lowrank_s.detach() for layer in layers]
    nuclear = sum(sum(abs(float(v)) for v in s) for s in spectra)
    hoyer = sum(
        sum(abs(float(v)) for v in s) / sum(float(v) ** 2 for v in s) ** 0.5 for s in spectra
    )
    assert rank_penalty(layers, "nuclear").item() == pytest.approx(nuclear, rel=1e-12)
    assert rank_penalty(layers, "hoyer").item() == pytest.approx(hoyer, rel=1e-12)
    assert rank_penalty(layers, "none").item() == 0.0


@pytest.mark.parametrize("kind", ["nuclear", "hoyer"])
def test_the_gradients_of_the_rank_penalties_are_the_formulas(kind: str):
    layers = odd_layers()
    rank_penalty(layers, kind).backward()
    for layer in layers:
        s = layer.lowrank_s.detach()
        expected = s.sign()
        if kind == "hoyer":
            expected = s.sign() / s.norm() - s.abs().sum() * s / s.norm() ** 3
        torch.testing.assert_close(layer.lowrank_s.grad, expected)
        assert layer.lowrank_A.weight.grad is None


def test_hoyer_does_not_see_the_scale_and_nuclear_does():
    layer = training_layer()
    before = rank_penalty([layer], "hoyer").item(), rank_penalty([layer], "nuclear").item()
    with torch.no_grad():
        layer.lowrank_s.mul_(3)
    assert rank_penalty([layer], "hoyer").item() == pytest.approx(before[0], rel=1e-5)
    assert rank_penalty([layer], "nuclear").item() == pytest.approx(3 * before[1], rel=1e-5)


def test_a_spectrum_of_zeros_has_a_finite_penalty_and_gradient():
    layer = training_layer()
    with torch.no_grad():
        layer.lowrank_s.zero_()
    penalty = rank_penalty([layer], "hoyer")
    penalty.backward()
    assert penalty.item() == 0.0
    assert bool(torch.isfinite(layer.lowrank_s.grad).all())


def test_no_layers_and_layers_without_a_spectrum():
    assert float(orthogonality_penalty([])) == 0.0
    assert rank_penalty([], "hoyer").item() == 0.0
    assert float(rank_penalty([LowRankLinear(4, 4, 2)], "nuclear")) == 0.0


def test_an_unknown_kind_is_refused():
    message = "rank_penalty must be one of hoyer, nuclear, none; got 'l0'"
    with pytest.raises(ConfigError, match=message):
        rank_penalty([training_layer()], "l0")
