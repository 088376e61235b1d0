"""Ranks of pruned weights."""

import pytest
import torch

from hf_lowrank.errors import NumericalError
from hf_lowrank.pruning.pruned_ranks import mean_ranks, rank_profile, target_weights
from tests.tiny_models import tiny_bert_classifier


def test_a_matrix_with_known_singular_values():
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(6, 4, generator=generator).double()).Q
    right = torch.linalg.qr(torch.randn(5, 4, generator=generator).double()).Q
    sigma = torch.tensor([10.0, 5.0, 0.05, 0.0]).double()
    found = rank_profile(left @ sigma.diag() @ right.T, threshold=0.01, energy=0.9)
    assert (found.matrix_rank, found.numerical_rank, found.energy_rank) == (3, 2, 2)
    assert found.stable_rank == pytest.approx((100 + 25 + 0.0025) / 100)
    assert found.spectrum[:3] == pytest.approx([1.0, 0.5, 0.005])
    assert found.density == 1.0
    low = rank_profile(left @ sigma.diag() @ right.T, threshold=0.001, energy=0.7)
    assert (low.numerical_rank, low.energy_rank) == (3, 1)


def test_zero_rows_lower_the_rank_and_scattered_zeros_do_not():
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    rows, scattered = weight.clone(), weight.clone()
    rows[8:] = 0
    scattered[(torch.arange(16)[:, None] + torch.arange(16)) % 2 == 0] = 0
    scattered[0, 0] = 1.0
    assert rank_profile(rows).matrix_rank == 8
    assert rank_profile(rows).density == 0.5
    assert rank_profile(scattered).matrix_rank > 14


def test_means_are_over_layers_and_the_density_over_entries():
    weights = {"a": torch.eye(4), "b": torch.ones(2, 2)}
    found = mean_ranks(weights)
    assert found.matrix_rank == 2.5
    assert found.density == (4 + 4) / 20
    assert found.layers["b"].numerical_rank == 1


def test_an_empty_matrix_has_rank_0_and_nan_is_refused():
    assert rank_profile(torch.zeros(3, 2)).energy_rank == 0
    with pytest.raises(NumericalError, match="holds NaN or infinity"):
        rank_profile(torch.tensor([[float("nan")]]))


def test_target_weights_are_the_encoder_s():
    weights = target_weights(tiny_bert_classifier())
    assert len(weights) == 12
    assert all("encoder.layer" in name for name in weights)
