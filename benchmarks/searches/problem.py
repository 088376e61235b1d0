"""`RankProblem`: what a search over ranks is given, and what the searches share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import ConfigError, NumericalError
from hf_lowrank.ranks.hull import tail_sums
from hf_lowrank.ranks.plan import RankPlan, layer_cost
from hf_lowrank.ranks.threshold import plan_for_scores
from hf_lowrank.report.layers import block_number

Measure = Callable[[RankPlan], float]


@dataclass(frozen=True)
class RankProblem:
    """Ranks wanted for some layers within a budget.

    Attributes:
        shapes: (out_features, in_features) of every targeted layer.
        spectra: Spectrum of every layer that is not in `fixed`.
        param_ratio: Kept / dense parameters over these layers, in (0, 1].
        measure: Loss of the model under a plan on held-out data, nats, or None.
        trials: Plans that a search may try.
        seed: Seed of the search.
        min_rank: Smallest rank of a factorized layer.
        fixed: Ranks decided beforehand; they count towards the budget.
        form: Stored form of the layers with a rank.
    """

    shapes: Mapping[str, tuple[int, int]]
    spectra: Mapping[str, Spectrum]
    param_ratio: float
    measure: Measure | None = None
    trials: int = field(kw_only=True)
    seed: int = 0
    min_rank: int = 1
    fixed: Mapping[str, int | None] = field(default_factory=dict)
    form: str = "factors"
    _known: dict[tuple[tuple[str, int | None], ...], float] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def free(self) -> list[str]:
        """Names of the layers whose ranks are searched for."""
        return [name for name in self.shapes if name in self.spectra and name not in self.fixed]

    def plan(self, scores: Mapping[str, torch.Tensor]) -> RankPlan:
        """The best-scored components within the budget; see `plan_for_scores`."""
        return plan_for_scores(
            self.shapes,
            scores,
            self.param_ratio,
            min_rank=self.min_rank,
            fixed=self.fixed,
            form=self.form,
        )

    def plan_for_weights(self, weights: Mapping[str, float]) -> RankPlan:
        """Kept shares in proportion to positive weights by layer; a common factor fills the budget.

        With equal weights this is the `uniform` rule.
        """
        scores = {}
        for name in self.free:
            shape = self.shapes[name]
            ranks = range(1, min(shape) + 1)
            costs = [layer_cost(shape, rank, self.form) for rank in ranks]
            shares = torch.tensor(costs, dtype=torch.float64) / layer_cost(shape, None)
            scores[name] = -shares / weights[name]
        return self.plan(scores)

    def loss(self, plan: RankPlan) -> float:
        """Measured loss of a plan, each plan once; infinity where it is not a number.

        Raises:
            ConfigError: The problem has no `measure`.
        """
        if self.measure is None:
            raise ConfigError("This search of ranks measures losses; pass held-out batches.")
        key = tuple(sorted(plan.ranks.items()))
        if key not in self._known:
            try:
                value = self.measure(plan)
            except NumericalError:  # such a plan is merely the worst
                value = math.inf
            self._known[key] = value if math.isfinite(value) else math.inf
        return self._known[key]

    def errors(self) -> dict[str, torch.Tensor]:
        """Error of each layer at each rank, shape (min(m, n) + 1,): what needs no measurement.

        Prices (nats) where the metric has them, else shares of the layer's energy.
        """
        found = {}
        for name in self.free:
            spectrum = self.spectra[name]
            if spectrum.price is None:
                squares = spectrum.sigma**2
                tiny = torch.finfo(torch.float64).tiny
                found[name] = tail_sums(squares / squares.sum().clamp_min(tiny))
            else:
                found[name] = tail_sums(spectrum.price)
        return found


def best_of(plans: Sequence[RankPlan], loss: Measure) -> RankPlan:
    """The plan of the smallest loss; the first of equals.

    Raises:
        NumericalError: No plan has a finite loss.
    """
    best = min(plans, key=loss)
    if math.isinf(loss(best)):
        raise NumericalError("No plan that the search of ranks tried has a finite loss.")
    return best


def layer_groups(names: Sequence[str], depths: int) -> dict[str, list[str]]:
    """Layers by type (last part of the name) and by depth, from the numbers in the names.

    Args:
        names: Layer names such as `model.layers.3.self_attn.q_proj`.
        depths: Parts into which the numbered blocks are divided; 1 groups by type alone.

    Returns:
        Names by group, in the order of first appearance.
    """
    blocks = [block_number(name) for name in names]
    total = max(blocks, default=0) + 1
    groups: dict[str, list[str]] = {}
    for name, block in zip(names, blocks, strict=True):
        # A bare index, as in nn.Sequential, says where a layer stands and not what it is.
        kind = next((part for part in reversed(name.split(".")) if not part.isdigit()), "layer")
        groups.setdefault(f"{kind}/{block * depths // total}", []).append(name)
    return groups


def group_weights(
    groups: Mapping[str, Sequence[str]], log2_weights: Sequence[float]
) -> dict[str, float]:
    """Weight by layer from one base-2 logarithm by group."""
    return {
        name: 2.0**value
        for names, value in zip(groups.values(), log2_weights, strict=True)
        for name in names
    }
