"""`thin_svd` against the SVD of the product."""

import numpy as np
import pytest
import torch

from hf_lowrank.decomposition.thin import thin_svd
from hf_lowrank.errors import NumericalError


def factors(m: int, k: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)


@pytest.mark.parametrize(
    ("m", "k", "n"), [(9, 4, 7), (7, 4, 9), (5, 5, 5), (4, 8, 6), (6, 8, 4), (3, 1, 3)]
)
def test_it_is_the_svd_of_the_product(m: int, k: int, n: int):
    left, right = factors(m, k, n)
    U, s, Vh = thin_svd(left, right)
    rank = min(m, k, n)
    assert (U.shape, s.shape, Vh.shape) == ((m, rank), (rank,), (rank, n))
    assert U.dtype == s.dtype == Vh.dtype == torch.float64
    product = left.double().numpy() @ right.double().numpy()
    expected = np.linalg.svd(product, compute_uv=False)[:rank]
    np.testing.assert_allclose(s.numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(((U * s) @ Vh).numpy(), product, atol=1e-12)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, eye)
    torch.testing.assert_close(Vh @ Vh.T, eye)


def test_values_descend_although_the_factors_are_in_another_order():
    left, right = factors(8, 5, 6)
    scale = torch.tensor([0.1, 5.0, -2.0, 0.0, 1.0])
    _, s, _ = thin_svd(left * scale, right)
    assert bool((s[:-1] >= s[1:]).all())
    assert bool((s >= 0).all())
    assert float(s[-1]) < 1e-10


def test_low_precision_factors_are_decomposed_in_fp64():
    left, right = (factor.bfloat16() for factor in factors(8, 3, 6))
    U, s, Vh = thin_svd(left, right)
    torch.testing.assert_close((U * s) @ Vh, left.double() @ right.double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(bad: float):
    left, right = factors(8, 5, 6)
    left[0, 0] = bad
    with pytest.raises(NumericalError, match=r"^the weight holds NaN or infinity$"):
        thin_svd(left, right)
