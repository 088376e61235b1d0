"""The candidates of the joint system: other ranks, corrected factors, each measured.

See docs/methods.md, 5.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from hf_lowrank.compression.analysis import Analysis
from hf_lowrank.compression.goals import smallest_share
from hf_lowrank.compression.held_out import HeldOutLoss, check_fixed_ranks
from hf_lowrank.compression.joint.first_order import (
    corrected_factors,
    first_order_terms,
    trusted_tails,
)
from hf_lowrank.decomposition.spectrum import Factors
from hf_lowrank.errors import NumericalError
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.rules import RULES
from hf_lowrank.ranks.threshold import plan_for_scores, predicted_rise
from hf_lowrank.ranks.tolerance import LossDifference, Probe, search_tolerance
from hf_lowrank.report.sections import Trial


@dataclass(frozen=True)
class JointSettings:
    """What is tried beside plain `kfac` with `price`.

    Attributes:
        trusts: Limits of the first-order correction of the prices; see `trusted_tails`.
        largest_steps: Limits of the correction of the factors, as relative weight noise, tried
            in this order until one is accepted; see `corrected_factors`.
    """

    trusts: tuple[float, ...] = (0.25, 0.5, 1.0)
    largest_steps: tuple[float, ...] = (8e-3, 2e-3)


@dataclass(frozen=True)
class Candidate:
    """A way to compress the model, and what it costs on the acceptance set.

    Attributes:
        name: How it was made.
        plan: Ranks.
        factors: Factors of every layer.
        difference: Rise of the loss on the acceptance set.
    """

    name: str
    plan: RankPlan
    factors: Mapping[str, Factors]
    difference: LossDifference


class Candidates:
    """What can be made of one model, and what was measured of it.

    Args:
        model: The dense model; it is dense again after every measurement.
        analysis: Its spectra, with gradients.
        held_out: Measures on the acceptance set.
        settings: What is tried.

    Attributes:
        known: What was measured, by step of the correction and choices of the plan.
        decompositions: Matrices decomposed so far.
    """

    def __init__(
        self, model: nn.Module, analysis: Analysis, held_out: HeldOutLoss, settings: JointSettings
    ) -> None:
        self.model = model
        self.analysis = analysis
        self.held_out = held_out
        self.settings = settings
        self.decompositions = len(analysis.spectra)
        self.known: dict[tuple[float, tuple[Hashable, ...]], Trial] = {}
        self.linear = {
            name: first_order_terms(factors, analysis.gradients.mean[name])
            for name, factors in analysis.factors.items()
        }

    def best_at(self, param_ratio: float) -> tuple[Candidate, Candidate]:
        """Plain `price` at a size, and the candidate of the smallest loss."""
        candidates = self._candidates(param_ratio, math.inf)
        baseline = best = next(candidates)
        for candidate in candidates:
            if _is_better(candidate, best):
                best = candidate
        return baseline, best

    def smallest_within(self, tolerance: float) -> tuple[Candidate, Candidate, list[Probe]]:
        """The smallest plain `price` within a tolerance, and the smallest candidate at all."""
        largest = self.analysis.plan_for_ratio(1.0)
        check_fixed_ranks(self.held_out, self.analysis.factors, largest, tolerance)
        baseline, probes = self._search(tolerance, largest, only_plain=True)
        smallest, more = self._search(tolerance, largest, only_plain=False)
        if smallest.plan.kept_parameters >= baseline.plan.kept_parameters:
            smallest = baseline
        return baseline, smallest, probes + more

    def _search(
        self, tolerance: float, largest: RankPlan, *, only_plain: bool
    ) -> tuple[Candidate, list[Probe]]:
        """Bisection over the size, at each size over the candidates."""
        whole = LossDifference(0.0, 0.0, len(self.held_out.dense.items), True)
        found = {largest.choices: Candidate("price", largest, self.analysis.factors, whole)}

        def measure(plan: RankPlan, limit: float) -> LossDifference:
            best: Candidate | None = None
            for candidate in self._candidates(plan.param_ratio, limit):
                if best is None or _is_better(candidate, best):
                    best = candidate
                if only_plain or (best.difference.complete and best.difference.mean <= limit):
                    break
            assert best is not None  # the first candidate always comes
            found[plan.choices] = best
            return best.difference

        plan, probes = search_tolerance(
            self.analysis.plan_for_ratio,
            partial(predicted_rise, self.analysis.spectra),
            measure,
            tolerance,
            smallest=smallest_share(self.analysis),
        )
        return found[plan.choices], probes

    def _candidates(self, param_ratio: float, limit: float) -> Iterator[Candidate]:
        """Measured candidates at a size: `price`, other ranks, then corrections of the best."""
        factors = self.analysis.factors
        plan = self.analysis.plan_for_ratio(param_ratio)
        best = self._measure("price", plan, factors, limit)
        yield best
        for trust in self.settings.trusts:
            plan = self._trusted_plan(param_ratio, trust)
            candidate = self._measure(
                f"trust {trust:g}", plan, factors, min(limit, best.difference.mean)
            )
            yield candidate
            best = candidate if _is_better(candidate, best) else best
        for step in self.settings.largest_steps:
            corrected = {**factors, **self._corrections(best.plan, step)}
            candidate = self._measure(
                f"{best.name}, step {step:g}",
                best.plan,
                corrected,
                min(limit, best.difference.mean),
                step,
            )
            yield candidate
            if _is_better(candidate, best):
                return

    def _measure(
        self,
        name: str,
        plan: RankPlan,
        factors: Mapping[str, Factors],
        stop_above: float,
        step: float = 0.0,
    ) -> Candidate:
        """A candidate with its measured rise; what was measured before is not measured again."""
        key = (step, plan.choices)
        if key not in self.known:
            try:
                difference = self.held_out.difference(factors, plan, stop_above)
            except NumericalError:
                if name == "price":
                    raise
                difference = LossDifference(math.inf, math.inf, 0, False)  # merely refused
            self.known[key] = Trial(**vars(difference), name=name, param_ratio=plan.param_ratio)
        return Candidate(name, plan, factors, self.known[key])

    def _trusted_plan(self, param_ratio: float, trust: float) -> RankPlan:
        analysis, form = self.analysis, self.analysis.config.inference_form
        scores, tails = {}, {}
        for name, spectrum in analysis.spectra.items():
            scores[name] = RULES["price"](spectrum, form)
            if spectrum.price is not None:
                tails[name] = trusted_tails(spectrum.price, self.linear[name], trust)
        return plan_for_scores(
            analysis.shapes,
            scores,
            param_ratio,
            tails=tails,
            **analysis.limits,
        )

    def _corrections(self, plan: RankPlan, largest_step: float) -> dict[str, Factors]:
        """Corrected factors of the layers whose error raises the loss to first order."""
        found, gradients = {}, self.analysis.gradients
        for name, rank in plan.ranks.items():
            if rank is not None:
                with contextlib.suppress(NumericalError):  # the layer keeps its plain factors
                    corrected = corrected_factors(
                        linear_weight(self.model.get_submodule(name)),
                        self.analysis.factors[name],
                        rank,
                        gradients.mean[name],
                        gradients.forms[name],
                        largest_step,
                    )
                    if corrected is not None:
                        found[name] = corrected
        self.decompositions += len(found)
        return found


def _is_better(candidate: Candidate, best: Candidate) -> bool:
    return candidate.difference.complete and (
        not best.difference.complete or candidate.difference.mean < best.difference.mean
    )
