"""`RankPlan`: the rank or shape of every targeted layer, between choosing and doing."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from hf_lowrank.errors import ConfigError

COMPACT = "compact"


def break_even_rank(out_features: int, in_features: int, form: str = "factors") -> int:
    """Smallest rank at which a layer holds at least as many parameters as the dense matrix.

    Two factors cost `k (m + n)` parameters against `m n`, so this is `ceil(m n / (m + n))`; the
    compact form is smaller at every rank below `min(m, n)`. Every useful rank lies below it.
    """
    if form == COMPACT:
        return min(out_features, in_features)
    return math.ceil(out_features * in_features / (out_features + in_features))


@dataclass(frozen=True)
class ExpertsPlan:
    """What is left of the fused experts of a layer.

    Attributes:
        experts: How many are left.
        width: Inner channels left of each.
        dense: The same two of the dense layer.
        channel_cost: Weights of one channel of one expert.

    Raises:
        ConfigError: More is left than there was, or nothing.
    """

    experts: int
    width: int
    dense: tuple[int, int]
    channel_cost: int

    def __post_init__(self) -> None:
        """Checks the limits."""
        if not _is_within((self.experts, self.width), self.dense):
            raise ConfigError(
                f"{self.experts} experts of {self.width} channels can't be left of {self.dense[0]} "
                f"of {self.dense[1]}."
            )

    @property
    def dense_parameters(self) -> int:
        """Weights before."""
        return self.dense[0] * self.dense[1] * self.channel_cost

    @property
    def kept_parameters(self) -> int:
        """Weights left."""
        return self.experts * self.width * self.channel_cost

    @property
    def is_cut(self) -> bool:
        """Whether anything is lost."""
        return (self.experts, self.width) != self.dense


@dataclass(frozen=True)
class RankPlan:
    """Ranks by layer name, and what is left of fused experts.

    Attributes:
        ranks: Rank of each targeted layer, None for dense.
        shapes: (out_features, in_features) of each targeted layer.
        narrowed: (out_features, in_features) left of the layers that lose channels; their rank is
            None.
        form: Stored form of the layers with a rank.
        experts: By the name of each targeted module of fused experts.

    Raises:
        ConfigError: The names differ, or a rank or shape is outside its layer's limits.
    """

    ranks: Mapping[str, int | None]
    shapes: Mapping[str, tuple[int, int]]
    narrowed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    form: str = "factors"
    experts: Mapping[str, ExpertsPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks names and limits."""
        if set(self.ranks) != set(self.shapes):
            odd = sorted(set(self.ranks) ^ set(self.shapes))
            raise ConfigError(
                f"Ranks and layers do not match: {', '.join(odd[:5])}; give a rank, or None for "
                "dense, to each targeted layer and to no other."
            )
        for name, rank in self.ranks.items():
            if rank is not None and not 1 <= rank <= min(self.shapes[name]):
                rows, columns = self.shapes[name]
                raise ConfigError(
                    f"{name}: rank {rank} is outside 1..min({rows}, {columns}); change the rank "
                    "or exclude the layer."
                )
        for name, shape in self.narrowed.items():
            if self.ranks.get(name) is not None or not _is_within(shape, self.shapes.get(name)):
                raise ConfigError(
                    f"{name}: can't be narrowed to {tuple(shape)}, at rank {self.ranks.get(name)} "
                    f"and shape {self.shapes.get(name)}; narrowed layers have no rank and keep "
                    "at most their size."
                )

    @property
    def choices(self) -> tuple[Hashable, ...]:
        """What tells one plan for some layers from another."""
        layers = (
            tuple(self.narrowed[name]) if name in self.narrowed else rank
            for name, rank in self.ranks.items()
        )
        return (*layers, *((each.experts, each.width) for each in self.experts.values()))

    @property
    def dense_parameters(self) -> int:
        """Weights of the targeted layers before compression (biases not counted)."""
        layers = sum(rows * columns for rows, columns in self.shapes.values())
        return layers + sum(each.dense_parameters for each in self.experts.values())

    @property
    def kept_parameters(self) -> int:
        """Weights of the targeted layers after compression."""
        left = {**self.shapes, **self.narrowed}
        layers = sum(layer_cost(left[name], rank, self.form) for name, rank in self.ranks.items())
        return layers + sum(each.kept_parameters for each in self.experts.values())

    @property
    def param_ratio(self) -> float:
        """Kept / dense parameters of the targeted layers."""
        return self.kept_parameters / self.dense_parameters


def _is_within(shape: tuple[int, int], dense: tuple[int, int] | None) -> bool:
    return dense is not None and all(1 <= k <= n for k, n in zip(shape, dense, strict=True))


def layer_cost(shape: tuple[int, int], rank: int | None, form: str = "factors") -> int:
    """Parameters of a layer at a rank: `k (m + n)`, or `m n` for None (dense).

    The compact form holds `k (m + n - k)`.
    """
    rows, columns = shape
    if rank is None:
        return rows * columns
    return rank * (rows + columns - (rank if form == COMPACT else 0))


def useful_rank(shape: tuple[int, int], rank: int, form: str = "factors") -> int | None:
    """The rank, or None (dense) where the layer would not be smaller than the matrix."""
    return None if rank >= break_even_rank(*shape, form) else rank
