"""Rank rules: a score for every component of every layer.

A rule scores the components of one layer, stored in a form, so that the scores never rise with
the index. One threshold over all layers then decides: component i of layer l is kept iff
`score[l][i] >= threshold` (docs/methods.md, section 2).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import ConfigError
from hf_lowrank.ranks.hull import Point, lower_hull, slope, tail_sums
from hf_lowrank.ranks.plan import COMPACT, layer_cost


def uniform(spectrum: Spectrum, form: str = "factors") -> torch.Tensor:
    """Minus the share of the layer that components 0..i cost: equal ratios for all layers."""
    return -_costs(spectrum, form)[1:] / layer_cost(spectrum.shape, None)


def _costs(spectrum: Spectrum, form: str) -> torch.Tensor:
    """Parameters at each rank from 0 on, shape (r + 1,), fp64."""
    ranks = range(len(spectrum.sigma) + 1)
    costs = [layer_cost(spectrum.shape, rank, form) for rank in ranks]
    return torch.tensor(costs, dtype=torch.float64)


def relative(spectrum: Spectrum, form: str = "factors") -> torch.Tensor:
    """sigma_i / sigma_1 (IJCAI 2025, Algorithm 2)."""
    return spectrum.sigma / spectrum.sigma[0].clamp_min(torch.finfo(torch.float64).tiny)


def energy(spectrum: Spectrum, form: str = "factors") -> torch.Tensor:
    """sigma_i^2 / sum of sigma^2."""
    squares = spectrum.sigma**2
    return squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)


def energy_share(spectrum: Spectrum, form: str = "factors") -> torch.Tensor:
    """Energy from component i on, as a share of the layer's: each layer keeps the same share.

    The per-layer heuristic of most early work: the smallest rank whose energy reaches a share.
    It stands in for Ito et al. 2021 and Cao et al. 2024, which the IJCAI 2025 table classes as
    per-layer heuristics; neither paper could be had, so no more than that class is reproduced.
    """
    squares = spectrum.sigma**2
    tail = squares.flip(0).cumsum(0).flip(0)
    return tail / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)


def stable_rank(spectrum: Spectrum, form: str = "factors") -> torch.Tensor:
    """Minus (i + 1) / stable rank: ranks in proportion to sum of sigma^2 / sigma_1^2.

    Cuttlefish (Wang et al., MLSys 2023). Simplified: the common factor of all ranks comes from the
    budget in place of a factor for each layer, its full rank over its stable rank at
    initialisation. When to cut in a training is decided in `training/switch.py`.
    """
    squares = spectrum.sigma**2
    tiny = torch.finfo(torch.float64).tiny
    rank = (squares.sum() / squares[0].clamp_min(tiny)).clamp_min(1.0)
    return -torch.arange(1, len(squares) + 1, dtype=torch.float64) / rank


def price(spectrum: Spectrum, form: str = "factors") -> torch.Tensor:
    """Predicted nats per parameter: price_i / (m + n) for two factors.

    In the compact form one more rank costs `m + n - 2k - 1`, the less the higher the rank, so that
    a later component may be the better buy. Components are then bought together: the score is the
    slope of the lower convex hull of (parameters, predicted rise).
    """
    if spectrum.price is None:
        raise ConfigError("rule 'price' needs metric 'kfac', whose singular values are prices.")
    if form != COMPACT:
        return spectrum.price / sum(spectrum.shape)
    costs, rises = _costs(spectrum, form).tolist(), tail_sums(spectrum.price).tolist()
    points: list[Point] = list(zip(costs, rises, range(len(costs)), strict=True))
    scores = torch.empty_like(spectrum.price)
    for before, after in itertools.pairwise(lower_hull(points)):
        scores[before[2] : after[2]] = -slope(before, after)
    return scores


RULES: dict[str, Callable[[Spectrum, str], torch.Tensor]] = {
    "uniform": uniform,
    "relative": relative,
    "energy": energy,
    "energy-share": energy_share,
    "stable-rank": stable_rank,
    "price": price,
}
