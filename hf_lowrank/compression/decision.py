"""`decide`: from an analysis to a plan, with what was measured on the way."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hf_lowrank.channels.expert_order import of_experts
from hf_lowrank.compression.analysis import Analysis
from hf_lowrank.compression.byte_budget import best_fit, fits
from hf_lowrank.compression.goals import likely_ratio, plan_for_goal, smallest_share
from hf_lowrank.compression.held_out import HeldOutLoss, check_fixed_ranks
from hf_lowrank.compression.options import Run
from hf_lowrank.compression.prices import enough, model_parts
from hf_lowrank.compression.rounding_prices import Rounding, rounding_prices
from hf_lowrank.evaluation.perplexity import measure_loss
from hf_lowrank.modeling.surgery import factorized
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.tolerance import LossDifference, Probe, paired_difference, search_tolerance
from hf_lowrank.report.quantization import SizeTrial
from hf_lowrank.report.sections import Joint, MeasuredPart


@dataclass(frozen=True)
class Decision:
    """What to do to a model, and why.

    Attributes:
        analysis: What the plan is cut from, with the prices that it was chosen by.
        plan: Ranks, and shapes of narrowed layers.
        probes: Steps of the search for a loss tolerance.
        held_out: Rise of the loss on held-out text that was accepted, where it was measured.
        parts: How far prices from held-out text are off those before.
        joint: What the joint system tried, None without it.
        size_trials: Types of weights that were tried towards a size in megabytes.
        bits: By matrix, where types are mixed.
    """

    analysis: Analysis
    plan: RankPlan
    probes: Sequence[Probe] = ()
    held_out: LossDifference | None = None
    parts: Sequence[MeasuredPart] = ()
    joint: Joint | None = None
    size_trials: Sequence[SizeTrial] = ()
    bits: Mapping[str, int] | None = None


def decide(model: nn.Module, analysis: Analysis, run: Run) -> Decision:
    """The plan that meets the goal of the analysis's config; the model is left as it is.

    Args:
        model: The model that was analyzed.
        analysis: Its spectra; another goal on the same spectra is `analysis.with_config(config)`.
        run: Held-out text and how to work.

    Raises:
        ConfigError: The goal can't be met.
        NumericalError: A loss is NaN or infinite.
    """
    parts: Sequence[MeasuredPart] = ()
    config, before = analysis.config, analysis
    if analysis.held_out is not None:
        with run.stopwatch.phase("prices"):
            plan = _likely_plan(model, analysis, run)
            analysis, parts = analysis.priced(
                plan, model_parts(model, [*plan.ranks, *plan.experts])
            )
    with run.stopwatch.phase("ranks"):
        chosen = plan_for_goal(analysis)
    if chosen is not None:
        other = None if before is analysis else plan_for_goal(before)
        if other is not None and _is_better(model, other, chosen, analysis, run):
            return Decision(before, other)
        return Decision(analysis, chosen, parts=parts)
    if config.megabytes is not None:
        return _within_size(model, analysis, run, parts)
    with run.stopwatch.phase("search"):
        searched = _within_tolerance(model, analysis, run)
        plan, probes, difference = run.processes.decide(searched)
    return Decision(analysis, plan, probes, difference, parts)


def _is_better(
    model: nn.Module, other: RankPlan, chosen: RankPlan, analysis: Analysis, run: Run
) -> bool:
    """Whether the plan by the prices of the calibration text does clearly better on held-out text.

    Prices from held-out text are of second order: they see nothing of a cut whose first small step
    changes nothing, such as of queries where attention has settled on one position.
    """
    if other.choices == chosen.choices:
        return False
    found = []
    with run.stopwatch.phase("prices"):
        for plan in (other, chosen):
            with factorized(model, analysis.factors, plan, analysis.orders):
                found.append(
                    measure_loss(
                        model,
                        enough(run.texts.held_out or []),
                        loss_function=run.options.loss_function,
                        progress="held-out data, a plan" if run.progress else None,
                    )
                )
    rise = paired_difference(found[0].items, found[1].items)
    # By chance alone one in forty equal plans seems better by more than two standard errors.
    return run.processes.decide(rise.mean > 2 * rise.standard_error)


def _likely_plan(model: nn.Module, analysis: Analysis, run: Run) -> RankPlan:
    """About what will be chosen; of several types for a size in megabytes the middle one's."""
    if analysis.config.megabytes is None:
        return analysis.plan_for_ratio(likely_ratio(analysis))
    found = fits(model, analysis, _rounding_prices(model, analysis, run))
    return found[len(found) // 2].plan


def _rounding_prices(model: nn.Module, analysis: Analysis, run: Run) -> dict[str, Rounding]:
    """Prices of rounding where types may be mixed: they are left open, and there are prices."""
    config = analysis.config
    if config.weights is not None or config.effective_rule != "price":
        return {}
    if of_experts(analysis.orders) and run.texts.held_out:  # whole types alone know of these
        return {}
    return rounding_prices(model, analysis)


def _within_size(
    model: nn.Module, analysis: Analysis, run: Run, parts: Sequence[MeasuredPart]
) -> Decision:
    """The plan and the types of the weights that do best within `megabytes`."""
    with run.stopwatch.phase("ranks"):
        found = fits(model, analysis, _rounding_prices(model, analysis, run))
    with run.stopwatch.phase("search"):
        chosen = best_fit(model, analysis, found, held_out_loss(model, run))
        fit, trials = run.processes.decide(chosen)
    if isinstance(fit.weights, Mapping):
        return Decision(analysis, fit.plan, parts=parts, bits=fit.weights)
    analysis = analysis.with_config(analysis.config.replace(weights=fit.weights))
    return Decision(analysis, fit.plan, parts=parts, size_trials=trials)


def held_out_loss(model: nn.Module, run: Run) -> HeldOutLoss:
    """Measures plans on a run's held-out batches."""
    loss_function = run.options.loss_function
    return HeldOutLoss(model, run.texts.held_out or [], loss_function, run.progress)


def _within_tolerance(
    model: nn.Module, analysis: Analysis, run: Run
) -> tuple[RankPlan, list[Probe], LossDifference]:
    """The smallest plan that is measured to be within the loss tolerance."""
    held_out, tolerance = held_out_loss(model, run), analysis.config.effective_tolerance
    measured: dict[tuple[Hashable, ...], LossDifference] = {}

    def measure(plan: RankPlan, limit: float) -> LossDifference:
        found = held_out.difference(analysis.factors, plan, limit, analysis.orders)
        measured[plan.choices] = found
        return found

    largest = analysis.plan_for_ratio(1.0)
    check_fixed_ranks(held_out, analysis.factors, largest, tolerance)
    plan, probes = search_tolerance(
        analysis.plan_for_ratio,
        analysis.predicted_rise,
        measure,
        tolerance,
        smallest=smallest_share(analysis),
        standard_error=analysis.standard_error,
    )
    dense = LossDifference(0.0, 0.0, len(held_out.dense.items), True)
    return plan, probes, measured.get(plan.choices, dense)
