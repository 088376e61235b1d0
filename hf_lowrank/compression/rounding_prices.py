"""Prices of fewer bits: what rounding a layer's weights is predicted to cost, in nats.

A rounding error E is nearly white, so in the `kfac` metric it costs `tr(P E Q E^T) = e^2 tr P tr Q`
with e^2 its mean square: an error of a weight like a truncation, and paid from the same budget.
Rounding a factor is an error of the product, `B E` or `E A`. As component i's row of A and column
of B keep a share q of their squares as errors,

    A: q |a_i|^2 / n tr Q (b_i^T P b_i),      B: q |b_i|^2 / m tr P (a_i Q a_i^T),

where in the metric one of the two quadratic forms is 1 and the other sigma_i^2.
See docs/methods.md, 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hf_lowrank.compression.analysis import Analysis
from hf_lowrank.decomposition.spectrum import Factors, Spectrum
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.modeling.weight_precision import rounding_share
from hf_lowrank.ranks.plan import COMPACT

BITS = (8, 4)
# Every entry of a compact layer is made of its pivots, so their errors add up: int4 on 57 compact
# layers of SmolLM2-135M cost 8 times what it cost on two factors, int8 5 times (docs/LOG.md).
_COMPACT = 8.0


@dataclass(frozen=True)
class Rounding:
    """What rounding one layer's weights costs, by their bits.

    Attributes:
        shares: Mean square of the errors over that of the weight, by bits.
        dense: Rise of the mean loss for a share of 1 of the dense weight's squares, nats.
        factors: Rises for a share of 1 of A's and of B's squares at each rank, nats, each of
            shape (r + 1,), fp64.
    """

    shares: Mapping[int, float]
    dense: float
    factors: tuple[torch.Tensor, torch.Tensor]

    def rise(self, bits: int | None) -> float:
        """Of the dense weight."""
        return 0.0 if bits is None else self.shares[bits] * self.dense

    def low_rank_rise(self, rank: int, bits: tuple[int | None, int | None], form: str) -> float:
        """Of A and B at a rank."""
        rises = (
            0.0 if each is None else self.shares[each] * float(rises[rank])
            for each, rises in zip(bits, self.factors, strict=True)
        )
        return sum(rises) * (_COMPACT if form == COMPACT else 1.0)


def rounding_prices(model: nn.Module, analysis: Analysis) -> dict[str, Rounding]:
    """Of every layer whose metric has prices.

    Args:
        model: The dense model.
        analysis: Its spectra and factors.
    """
    found = {}
    for name, spectrum in analysis.spectra.items():
        if spectrum.traces is not None:
            weight = linear_weight(model.get_submodule(name))
            found[name] = rounding_of(weight, spectrum, analysis.factors[name])
    return found


def rounding_of(weight: torch.Tensor, spectrum: Spectrum, factors: Factors) -> Rounding:
    """Of one layer.

    Args:
        weight: Shape (m, n).
        spectrum: With traces.
        factors: Of the same decomposition.
    """
    assert spectrum.traces is not None
    (m, n), (scale, outer, inner) = spectrum.shape, spectrum.traces
    squares = spectrum.sigma**2
    ones = torch.ones_like(squares)
    of_outputs, of_inputs = (squares, ones) if m >= n else (ones, squares)
    of_a = factors.right.double().square().sum(dim=1).cpu() * of_outputs * (scale * inner / n)
    of_b = factors.left.double().square().sum(dim=0).cpu() * of_inputs * (scale * outer / m)
    first = torch.zeros(1, dtype=torch.float64)
    return Rounding(
        {bits: rounding_share(weight, bits) for bits in BITS},
        scale * outer * inner * float(weight.detach().double().square().mean()),
        (torch.cat([first, of_a.cumsum(0)]), torch.cat([first, of_b.cumsum(0)])),
    )
