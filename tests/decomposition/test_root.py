"""`matrix_root` of definite, singular and indefinite forms."""

import numpy as np
import pytest
import torch

from hf_lowrank.decomposition.spectrum import matrix_root
from hf_lowrank.errors import NumericalError
from tests.decomposition import Layer, damped


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
