"""`compress_jointly`: ranks and factors that the gradient had a say in, kept only if they help.

Every candidate is judged by a forward pass on the acceptance set. The first candidate is plain
`kfac` with the `price` rule, so the result is never worse there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_lowrank.analysis import metric_settings
from hf_lowrank.compression import CompressionRun, RunOptions, Texts
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import METRICS
from hf_lowrank.decomposition.moments import Moments
from hf_lowrank.decomposition.spectrum import Spectrum
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.held_out import check_fixed_ranks
from hf_lowrank.joint.disjoint import check_disjoint
from hf_lowrank.joint.first_order import (
    corrected_spectrum,
    first_order_terms,
    retruncation_form,
    trusted_tails,
)
from hf_lowrank.losses import Batch, LossFunction
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.rules import RULES
from hf_lowrank.ranks.threshold import plan_for_scores, predicted_rise, smallest_ratio
from hf_lowrank.ranks.tolerance import LossDifference, Probe, search_tolerance
from hf_lowrank.report.schema import Report, jsonable
from hf_lowrank.statistics import collect_moments
from hf_lowrank.targets import linear_weight


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


@dataclass
class JointResult:
    """Result of `compress_jointly`.

    Attributes:
        report: As of `compress`; its evaluation is on the reported set, `held_out` is the rise
            on the acceptance set.
        method: Name of the accepted candidate, "price" if nothing did better.
        baseline: Rise of plain `kfac` with `price` on the acceptance set, at the same size, or
            at its own smallest size for a tolerance.
        baseline_ratio: Kept share of the baseline.
        trials: Name, kept share and rise of every candidate measured; one that was clearly worse
            than the best before all items were read is not `complete`.
    """

    report: Report
    method: str
    baseline: LossDifference
    baseline_ratio: float
    trials: list[dict[str, Any]]
    decompositions: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        data: dict[str, Any] = jsonable(dataclasses.asdict(self))
        return data


def compress_jointly(
    model: nn.Module,
    config: LowRankConfig,
    gradient: Sequence[Batch],
    acceptance: Sequence[Batch],
    reported: Sequence[Batch] | None = None,
    *,
    settings: JointSettings | None = None,
    **options: Any,
) -> JointResult:
    """Factorizes a model in place, with ranks and factors steered along the gradient.

    With `param_ratio` the candidate of the smallest loss on the acceptance set wins; with
    `loss_tolerance` (0: no rise at all) the smallest model within it.

    Args:
        model: The dense model; a transformers model, or any module with a `loss_function`.
        config: Goal, targets and damping; the metric is `kfac`.
        gradient: Batches for the moments and the gradient.
        acceptance: Batches that decide which candidate is kept.
        reported: Batches for the report's before and after; nothing else looks at them.
        settings: What is tried.
        **options: Fields of `RunOptions`, without `recover_steps`.

    Returns:
        The report and what was tried. The model itself is changed in place.

    Raises:
        ConfigError: The goal is `rank`, or the metric or rule is another.
        DataError: Two of the sets share an item, or a needed one is empty.
    """
    if config.metric != "kfac" or config.rule not in (None, "price"):
        raise ConfigError("Joint compression works with metric 'kfac' and rule 'price' only.")
    if config.goal == "rank" or config.ranks is not None:
        raise ConfigError("Joint compression chooses the ranks: set param_ratio or loss_tolerance.")
    if not gradient or not acceptance:
        raise DataError("Joint compression needs batches for the gradient and for acceptance.")
    check_disjoint(gradient=gradient, acceptance=acceptance, reported=reported)
    chosen = RunOptions(**options)
    if chosen.recover_steps:
        raise ConfigError("recover_steps judges by the acceptance set; recover afterwards instead.")
    run = CompressionRun(model, config, Texts(gradient, acceptance, reported), chosen)
    joint = _Joint(run, settings or JointSettings())
    with run.stopwatch.phase("search"):
        if config.param_ratio is not None:
            baseline, accepted = joint.best_at(config.param_ratio)
            probes: list[Probe] = []
        else:
            baseline, accepted, probes = joint.smallest_within(config.effective_tolerance)
    run.analysis = dataclasses.replace(run.analysis, spectra=dict(accepted.spectra))
    return JointResult(
        run.apply(accepted.plan, probes, accepted.difference),
        accepted.name,
        baseline.difference,
        baseline.plan.param_ratio,
        [
            {"name": each.name, "param_ratio": each.plan.param_ratio}
            | dataclasses.asdict(each.difference)
            for each in joint.known.values()
        ],
        joint.decompositions,
    )


class _Joint:
    """The candidates of one model."""

    def __init__(self, run: CompressionRun, settings: JointSettings) -> None:
        self.settings = settings
        self.run = run
        self.analysis = run.analysis
        self.held_out = run.held_out_loss()
        self.decompositions = len(run.analysis.spectra)
        self.known: dict[tuple[float, tuple[int | None, ...]], Candidate] = {}
        layers = {name: run.model.get_submodule(name) for name in run.analysis.spectra}
        with run.stopwatch.phase("gradient"):
            self.gradients, moments = mean_gradients(
                run.model, layers, run.texts.calibration or [], run.options.loss_function
            )
        kfac, numbers = METRICS["kfac"], metric_settings(run.config)
        self.forms = {
            name: retruncation_form(kfac.form(moment, numbers)) for name, moment in moments.items()
        }
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
            difference = self.held_out.difference(spectra, plan, stop_above)
            self.known[key] = Candidate(name, plan, spectra, difference)
        return self.known[key]

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


def mean_gradients(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    loss_function: LossFunction | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Moments]]:
    """Gradient of the mean loss by layer name, shape (m, n), and the second moments beside it.

    The labels are always the data's own: labels drawn from the model have no gradient on average.
    All gradients are held at once, in fp32: as much memory as the targeted weights.
    """
    needs = METRICS["kfac"].needs | {"gradient"}
    moments = collect_moments(model, targets, batches, needs, loss_function=loss_function)
    gradients = {}
    for name, moment in moments.items():
        assert moment.gradient is not None  # asked for
        gradients[name] = moment.gradient / moment.losses
        moment.gradient = None
    return gradients, moments


def _key(plan: RankPlan) -> tuple[int | None, ...]:
    return tuple(plan.ranks[name] for name in sorted(plan.ranks))


def _is_better(candidate: Candidate, best: Candidate) -> bool:
    return candidate.difference.complete and (
        not best.difference.complete or candidate.difference.mean < best.difference.mean
    )
