"""The rank that fits a share of a layer's parameters, layer by layer."""

from __future__ import annotations

import bisect

from hf_lowrank.ranks.plan import layer_cost


def rank_within(shape: tuple[int, int], share: float, form: str = "factors") -> int:
    """Largest rank whose parameters stay within a share of the dense layer's, maybe 0."""
    budget = share * layer_cost(shape, None)
    return bisect.bisect_right(
        range(1, min(shape) + 1), budget, key=lambda rank: layer_cost(shape, rank, form)
    )
