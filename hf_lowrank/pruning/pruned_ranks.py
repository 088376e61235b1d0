"""How low the rank of pruned weights is: the paper's case for pruning before factorizing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import NumericalError
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.modeling.targets import find_targets

_FIGURES = ("matrix_rank", "numerical_rank", "energy_rank", "stable_rank")


@dataclass(frozen=True)
class RankProfile:
    """Ranks of one matrix; sigma are its singular values, descending.

    Attributes:
        density: Share of the entries that are not 0.
        matrix_rank: Number of sigma above `max(m, n) * eps * sigma_1`, eps that of fp32.
        numerical_rank: Number of sigma above a threshold times sigma_1.
        energy_rank: Smallest k whose `sum_{i <= k} sigma_i^2` reaches a share of the whole.
        stable_rank: `sum sigma^2 / sigma_1^2`.
        spectrum: `sigma / sigma_1`.
    """

    density: float
    matrix_rank: int
    numerical_rank: int
    energy_rank: int
    stable_rank: float
    spectrum: list[float]


def rank_profile(
    weight: torch.Tensor, *, threshold: float = 0.01, energy: float = 0.9
) -> RankProfile:
    """Ranks of a matrix.

    Args:
        weight: Shape (m, n); the computation is in fp64.
        threshold: Of the numerical rank, relative to the largest singular value.
        energy: Share of the squares that the energy rank keeps.

    Raises:
        NumericalError: The matrix holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError("the weight holds NaN or infinity")
    sigma = torch.linalg.svdvals(weight.detach().double())
    largest = float(sigma[0])
    density = float((weight != 0).double().mean())
    if largest == 0:
        return RankProfile(density, 0, 0, 0, 0.0, sigma.tolist())
    relative = sigma / largest
    squares = relative**2
    shares = squares.cumsum(0) / squares.sum()
    return RankProfile(
        density=density,
        matrix_rank=int((relative > max(weight.shape) * torch.finfo(torch.float32).eps).sum()),
        numerical_rank=int((relative > threshold).sum()),
        energy_rank=int((shares < energy).sum()) + 1,
        stable_rank=float(squares.sum()),
        spectrum=relative.tolist(),
    )


@dataclass(frozen=True)
class MeanRanks:
    """Means over layers of the figures of `RankProfile`; the density is that of all entries."""

    density: float
    matrix_rank: float
    numerical_rank: float
    energy_rank: float
    stable_rank: float


@dataclass(frozen=True)
class LayerRanks(MeanRanks):
    """Means and the profile of each layer."""

    layers: dict[str, RankProfile]


@dataclass(frozen=True)
class NumericalRanks(MeanRanks):
    """Means and the numerical rank of each layer."""

    layers: dict[str, int]

    @classmethod
    def of(cls, ranks: LayerRanks) -> NumericalRanks:
        """The same, less of each layer."""
        found = {name: profile.numerical_rank for name, profile in ranks.layers.items()}
        return cls(**(vars(ranks) | {"layers": found}))


def target_weights(model: nn.Module, config: LowRankConfig | None = None) -> dict[str, Any]:
    """The target layers' weights by name, each (out_features, in_features), without a copy."""
    targets = find_targets(model, config or LowRankConfig())
    return {name: linear_weight(layer) for name, layer in targets.items()}


def mean_ranks(weights: Mapping[str, torch.Tensor], **settings: float) -> LayerRanks:
    """Ranks of all layers and their means.

    Args:
        weights: Matrices by layer name.
        **settings: `threshold` and `energy` of `rank_profile`.
    """
    profiles = {name: rank_profile(weight, **settings) for name, weight in weights.items()}
    entries = sum(weight.numel() for weight in weights.values())
    kept = sum(int((weight != 0).sum()) for weight in weights.values())
    means = {
        figure: sum(getattr(p, figure) for p in profiles.values()) / len(profiles)
        for figure in _FIGURES
    }
    return LayerRanks(density=kept / entries, **means, layers=profiles)
