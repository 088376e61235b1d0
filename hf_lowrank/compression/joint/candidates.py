"""The candidates of the joint system: other ranks, corrected factors, each measured."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from hf_lowrank.compression.held_out import check_fixed_ranks
from hf_lowrank.compression.joint.first_order import (
    corrected_spectrum,
    first_order_terms,
    trusted_tails,
)
from hf_lowrank.compression.joint.gradients import GradientReader
from hf_lowrank.compression.run import CompressionRun
from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import NumericalError
from hf_lowrank.format.dense_linear import linear_weight
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.rules import RULES
from hf_lowrank.ranks.threshold import plan_for_scores, predicted_rise, smallest_ratio
from hf_lowrank.ranks.tolerance import LossDifference, Probe, search_tolerance


@dataclass(frozen=True)
class JointSettings:
    """What is tried beside plain `kfac` with `price`.

    Attributes:
        trusts: Limits of the first-order correction of the prices; see `trusted_tails`.
        largest_steps: Limits of the correction of the factors, as relative weight noise, tried
            in this order until one is accepted; see `corrected_spectrum`.
    """

    trusts: tuple[float, ...] = (0.25, 0.5, 1.0)
    largest_steps: tuple[float, ...] = (8e-3, 2e-3)


@dataclass(frozen=True)
class Candidate:
    """A way to compress the model, and what it costs on the acceptance set.

    Attributes:
        name: How it was made.
        plan: Ranks.
        spectra: Where the factors come from.
        difference: Rise of the loss on the acceptance set.
    """

    name: str
    plan: RankPlan
    spectra: Mapping[str, Spectrum]
    difference: LossDifference


@dataclass(frozen=True)
class Trial:
    """What is remembered of a measured candidate: its name, kept share and rise of the loss."""

    name: str
    param_ratio: float
    difference: LossDifference


class Candidates:
    """What can be made of one model, and what was measured of it.

    Args:
        run: A compression whose texts are gradient set, acceptance set and reported set.
        settings: What is tried.
        reader: What was read of the gradient set.
    """

    def __init__(
        self, run: CompressionRun, settings: JointSettings, reader: GradientReader
    ) -> None:
        self.settings = settings
        self.run = run
        self.analysis = run.analysis
        self.held_out = run.held_out_loss()
        self.decompositions = len(run.analysis.spectra)
        self.known: dict[tuple[float, tuple[int | None, ...]], Trial] = {}
        self.gradients, self.forms = reader.gradients, reader.forms
        self.linear = {
            name: first_order_terms(spectrum, self.gradients[name])
            for name, spectrum in self.analysis.spectra.items()
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
        check_fixed_ranks(self.held_out, self.analysis.spectra, largest, tolerance)
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
        found = {_key(largest): Candidate("price", largest, self.analysis.spectra, whole)}

        def measure(plan: RankPlan, limit: float) -> LossDifference:
            best: Candidate | None = None
            for candidate in self._candidates(plan.param_ratio, limit):
                if best is None or _is_better(candidate, best):
                    best = candidate
                if only_plain or (best.difference.complete and best.difference.mean <= limit):
                    break
            assert best is not None  # the first candidate always comes
            found[_key(plan)] = best
            return best.difference

        plan, probes = search_tolerance(
            self.analysis.plan_for_ratio,
            partial(predicted_rise, self.analysis.spectra),
            measure,
            tolerance,
            smallest=smallest_ratio(
                self.analysis.shapes,
                min_rank=self.analysis.config.min_rank,
                fixed=self.analysis.fixed,
            ),
        )
        return found[_key(plan)], probes

    def _candidates(self, param_ratio: float, limit: float) -> Iterator[Candidate]:
        """Measured candidates at a size: `price`, other ranks, then corrections of the best."""
        spectra = self.analysis.spectra
        plan = self.analysis.plan_for_ratio(param_ratio)
        best = self._measure("price", plan, spectra, limit)
        yield best
        for trust in self.settings.trusts:
            plan = self._trusted_plan(param_ratio, trust)
            candidate = self._measure(
                f"trust {trust:g}", plan, spectra, min(limit, best.difference.mean)
            )
            yield candidate
            best = candidate if _is_better(candidate, best) else best
        for step in self.settings.largest_steps:
            corrected = dict(spectra) | self._corrections(best.plan, step)
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
        spectra: Mapping[str, Spectrum],
        stop_above: float,
        step: float = 0.0,
    ) -> Candidate:
        """A candidate with its measured rise; what was measured before is not measured again."""
        key = (step, _key(plan))
        if key not in self.known:
            try:
                difference = self.held_out.difference(spectra, plan, stop_above)
            except NumericalError:
                if name == "price":
                    raise
                difference = LossDifference(math.inf, math.inf, 0, False)  # merely refused
            self.known[key] = Trial(name, plan.param_ratio, difference)
        return Candidate(name, plan, spectra, self.known[key].difference)

    def _trusted_plan(self, param_ratio: float, trust: float) -> RankPlan:
        analysis = self.analysis
        scores, tails = {}, {}
        for name, spectrum in analysis.spectra.items():
            scores[name] = RULES["price"](spectrum)
            if spectrum.price is not None:
                tails[name] = trusted_tails(spectrum.price, self.linear[name], trust)
        return plan_for_scores(
            analysis.shapes,
            scores,
            param_ratio,
            tails=tails,
            min_rank=analysis.config.min_rank,
            fixed=analysis.fixed,
        )

    def _corrections(self, plan: RankPlan, largest_step: float) -> dict[str, Spectrum]:
        """Corrected spectra of the layers whose error raises the loss to first order."""
        found = {}
        for name, rank in plan.ranks.items():
            if rank is not None:
                with contextlib.suppress(NumericalError):  # the layer keeps its plain factors
                    corrected = corrected_spectrum(
                        linear_weight(self.run.model.get_submodule(name)),
                        self.analysis.spectra[name],
                        rank,
                        self.gradients[name],
                        self.forms[name],
                        largest_step,
                    )
                    if corrected is not None:
                        found[name] = corrected
        self.decompositions += len(found)
        return found


def _key(plan: RankPlan) -> tuple[int | None, ...]:
    return tuple(plan.ranks[name] for name in sorted(plan.ranks))


def _is_better(candidate: Candidate, best: Candidate) -> bool:
    return candidate.difference.complete and (
        not best.difference.complete or candidate.difference.mean < best.difference.mean
    )
