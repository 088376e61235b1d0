"""Ranks of weights that were pruned in different ways."""

import pytest
import torch

from benchmarks.pruned_ranks import compare_ranks
from hf_lowrank.errors import ConfigError


def test_ways_of_pruning_compare_at_equal_density_only():
    one, two = torch.eye(4), torch.zeros(4, 4)
    two[0] = 1.0
    found = compare_ranks({"movement": {"a": two}, "magnitude": {"a": one}})
    assert found["movement"].matrix_rank == 1
    assert found["magnitude"].matrix_rank == 4
    two[1] = 1.0
    with pytest.raises(ConfigError, match=r"movement 0\.5000, magnitude 0\.2500"):
        compare_ranks({"movement": {"a": two}, "magnitude": {"a": one}})
    with pytest.raises(ConfigError, match="have different layers; give those of one run"):
        compare_ranks({"movement": {"b": two}, "magnitude": {"a": one}})
