"""Ranks within a share of a layer's parameters, against all ranks."""

import pytest

from benchmarks.rank_within import rank_within
from hf_lowrank.ranks.plan import layer_cost


@pytest.mark.parametrize("form", ["factors", "compact"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_the_rank_within_a_share_is_the_largest(form, share):
    for shape in ((4, 12), (9, 9), (31, 17)):
        fitting = [
            k
            for k in range(1, min(shape) + 1)
            if layer_cost(shape, k, form) <= share * layer_cost(shape, None)
        ]
        assert rank_within(shape, share, form) == max(fitting, default=0)
