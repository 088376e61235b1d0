"""What fewer bits are predicted to cost, against the quadratic form itself."""

import pytest
import torch

from hf_lowrank.compression.rounding_prices import Rounding, rounding_of
from hf_lowrank.decomposition.metrics import QuadraticForm, Side
from hf_lowrank.decomposition.moments import SecondMoment
from hf_lowrank.decomposition.spectrum import decompose
from hf_lowrank.modeling.weight_precision import rounding_share

pytest.importorskip("torchao.quantization")
SCALE = 0.01
SHAPES = pytest.mark.parametrize("shape", [(12, 8), (8, 12)])


def moment_of(size, generator):
    """A full second moment of 40 vectors that are louder in some directions than in others."""
    vectors = torch.randn(40, size, generator=generator, dtype=torch.float64)
    vectors = vectors * torch.linspace(0.2, 2.0, size, dtype=torch.float64)
    return vectors.T @ vectors


def random_layer(shape):
    """A weight, P, Q, and the form that they make."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    outer, inner = (moment_of(size, generator) for size in shape)
    sides = (Side(moment=SecondMoment(x, float(x.trace()), len(x))) for x in (outer, inner))
    return weight, outer, inner, QuadraticForm(*sides, price_scale=SCALE)


@SHAPES
def test_the_price_of_a_dense_weight_is_what_white_errors_cost_on_average(shape):
    weight, outer, inner, form = random_layer(shape)
    spectrum, factors = decompose(weight, form, dtype=torch.float64)
    price = rounding_of(weight.float(), spectrum, factors)
    share = 1e-3
    size = (share * weight.square().mean()).sqrt()
    generator = torch.Generator().manual_seed(1)
    errors = size * torch.randn(20_000, *shape, generator=generator, dtype=torch.float64)
    costs = SCALE * torch.einsum("ij,bjk,kl,bil->b", outer, errors, inner, errors)
    assert share * price.dense == pytest.approx(float(costs.mean()), rel=0.02)


@SHAPES
@pytest.mark.parametrize("rank", [1, 5, 8])
def test_the_price_of_each_factor_is_the_error_of_the_product(shape, rank):
    weight, outer, inner, form = random_layer(shape)
    spectrum, factors = decompose(weight, form, dtype=torch.float64)
    price = rounding_of(weight.float(), spectrum, factors)
    a, b = factors.balanced(rank)
    share = 0.01
    of_a = share * a.square().mean(dim=1) * (b.T @ outer @ b).diagonal() * inner.trace()
    of_b = share * b.square().mean(dim=0) * (a @ inner @ a.T).diagonal() * outer.trace()
    found = Rounding({4: share, 8: 0.0}, price.dense, price.factors)
    assert found.low_rank_rise(rank, (4, 8), "factors") == pytest.approx(SCALE * float(of_a.sum()))
    assert found.low_rank_rise(rank, (8, 4), "factors") == pytest.approx(SCALE * float(of_b.sum()))
    assert found.low_rank_rise(rank, (None, None), "factors") == 0


def test_four_bits_leave_about_256_times_the_error_of_eight():
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    shares = {bits: rounding_share(weight, bits) for bits in (8, 4)}
    assert 1e-5 < shares[8] < 1e-4
    assert 3e-3 < shares[4] < 1.5e-2
