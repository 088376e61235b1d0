"""`compress`: the one verb. Statistics, spectra, ranks, surgery, report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from hf_lowrank.analysis import DEFAULT_MOMENT_GIB, Analysis, Stopwatch, analyze
from hf_lowrank.cache import RunCache
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import DataError
from hf_lowrank.evaluation.perplexity import LossMeasurement, iterate_losses, measure_loss
from hf_lowrank.loading import attach_config
from hf_lowrank.losses import Batch, LossFunction
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.threshold import predicted_rise
from hf_lowrank.ranks.tolerance import (
    LossDifference,
    Probe,
    paired_difference,
    search_tolerance,
)
from hf_lowrank.report.schema import Evaluation, Report, versions
from hf_lowrank.surgery import factorize_, factorized, restore_
from hf_lowrank.targets import find_targets, untouched_weights

SMALLEST_RATIO = 0.02


@dataclass(frozen=True)
class Texts:
    """The three disjoint sets of batches of a run.

    Attributes:
        calibration: For the moments.
        held_out: For the search of a loss tolerance.
        evaluation: For the report alone.
    """

    calibration: Sequence[Batch] | None = None
    held_out: Sequence[Batch] | None = None
    evaluation: Sequence[Batch] | None = None


def compress(
    model: nn.Module,
    config: LowRankConfig | None = None,
    calibration: Sequence[Batch] | None = None,
    evaluation: Sequence[Batch] | None = None,
    *,
    held_out: Sequence[Batch] | None = None,
    loss_function: LossFunction | None = None,
    cache_dir: str | Path | None = None,
    moment_gib: float = DEFAULT_MOMENT_GIB,
    progress: bool = True,
) -> Report:
    """Factorizes a model's linear layers in place, with ranks chosen by their effect on the loss.

    Afterwards `model.save_pretrained` writes a checkpoint that `from_pretrained` loads once
    hf_lowrank is imported.

    Args:
        model: The dense model; a transformers model, or any module with a `loss_function`.
        config: Goal, metric, rule and targets; by default a loss tolerance of 0.05 nats.
        calibration: Batches of forward inputs (tensors by name) for the moments.
        evaluation: Batches for the report's before and after; nothing else looks at them.
        held_out: Batches on which a loss tolerance is tested. By default the last quarter of the
            calibration batches, which then do not enter the moments.
        loss_function: Loss of a batch; by default the model's own task loss.
        cache_dir: Folder for moments and spectra, to go on from after a kill.
        moment_gib: Memory for moments; more layers take more passes over the data.
        progress: Whether to show progress bars.

    Returns:
        The report. The model itself is changed in place.

    Raises:
        ConfigError, TargetError, DataError: Before anything is changed.
        NumericalError: A loss is NaN or infinite.
    """
    config = config or LowRankConfig()
    texts = split_texts(config, Texts(calibration, held_out, evaluation))
    run = _Run(model, config, texts, loss_function, cache_dir, moment_gib, progress)
    plan, probes, held_out_difference = run.choose()
    return run.apply(plan, probes, held_out_difference)


def sweep(
    model: nn.Module,
    config: LowRankConfig,
    param_ratios: Sequence[float],
    calibration: Sequence[Batch] | None = None,
    evaluation: Sequence[Batch] | None = None,
    *,
    loss_function: LossFunction | None = None,
    cache_dir: str | Path | None = None,
    moment_gib: float = DEFAULT_MOMENT_GIB,
    progress: bool = True,
) -> Iterator[Report]:
    """Compresses a model at several sizes from the same spectra.

    The model is compressed while the caller handles each report, and dense again afterwards.

    Args:
        model: The dense model.
        config: Metric, rule and targets; its goal is replaced by each ratio.
        param_ratios: Kept shares of the targeted parameters.
        calibration: As in `compress`.
        evaluation: As in `compress`.
        loss_function: As in `compress`.
        cache_dir: As in `compress`.
        moment_gib: As in `compress`.
        progress: As in `compress`.

    Yields:
        One report for each ratio.
    """
    configs = [
        config.replace(param_ratio=ratio, loss_tolerance=None, rank=None) for ratio in param_ratios
    ]
    texts = Texts(calibration, None, evaluation)
    run = _Run(model, configs[0], texts, loss_function, cache_dir, moment_gib, progress)
    for each in configs:
        run.use(each)
        originals = {name: model.get_submodule(name) for name in run.analysis.shapes}
        shared = dict(run.stopwatch.seconds)
        report = run.apply(*run.choose())
        try:
            yield report
        finally:
            restore_(model, originals)
            run.detach()
            run.stopwatch.seconds = shared


def split_texts(config: LowRankConfig, texts: Texts) -> Texts:
    """Takes held-out batches off the calibration batches where a search needs them.

    Raises:
        DataError: A loss tolerance is asked for and there is too little calibration data.
    """
    if config.goal != "loss_tolerance" or texts.held_out is not None:
        return texts
    batches = list(texts.calibration or [])
    if len(batches) < 2:
        raise DataError(
            "A loss tolerance is tested on held-out text: pass at least two calibration batches, "
            "or held_out, or set param_ratio."
        )
    size = max(1, len(batches) // 4)
    return dataclasses.replace(texts, calibration=batches[:-size], held_out=batches[-size:])


class _Run:
    """One compression in progress: the analysis, and what was measured on the dense model."""

    def __init__(
        self,
        model: nn.Module,
        config: LowRankConfig,
        texts: Texts,
        loss_function: LossFunction | None,
        cache_dir: str | Path | None,
        moment_gib: float,
        progress: bool,
    ) -> None:
        self.model = model
        self.config = config
        self.texts = texts
        self.loss_function = loss_function
        self.progress = progress
        self.stopwatch = Stopwatch()
        self.untouched = untouched_weights(model, find_targets(model, config))
        self.sizes = model_sizes(model)
        cache = None
        if cache_dir is not None:
            cache = RunCache(Path(cache_dir), model, texts.calibration or [], config)
        self.analysis: Analysis = analyze(
            model,
            config,
            texts.calibration,
            loss_function=loss_function,
            cache=cache,
            stopwatch=self.stopwatch,
            moment_gib=moment_gib,
            progress=progress,
        )
        self.before: LossMeasurement | None = None
        if texts.evaluation is not None:
            with self.stopwatch.phase("evaluation"):
                self.before = self._measure(texts.evaluation, "evaluate dense")

    def use(self, config: LowRankConfig) -> None:
        """Goes on with another goal on the same spectra."""
        self.config = config
        self.analysis = dataclasses.replace(self.analysis, config=config)

    def detach(self) -> None:
        """Removes the low-rank marks after the dense layers were put back."""
        attach_config(self.model, None)

    def choose(self) -> tuple[RankPlan, list[Probe], LossDifference | None]:
        """The plan that meets the goal, and for a tolerance how it was found."""
        config = self.config
        with self.stopwatch.phase("ranks"):
            if config.param_ratio is not None:
                return self.analysis.plan_for_ratio(config.param_ratio), [], None
            if config.rank is not None:
                return self.analysis.plan_for_rank(config.rank), [], None
        with self.stopwatch.phase("search"):
            return self._search()

    def apply(self, plan: RankPlan, probes: list[Probe], held_out: LossDifference | None) -> Report:
        """Puts the plan into the model, measures it and reports."""
        with self.stopwatch.phase("surgery"):
            factorize_(self.model, self.analysis.spectra, plan)
            decided = self.config.replace(ranks=dict(plan.ranks))
            attach_config(self.model, decided)
        evaluation = None
        if self.before is not None and self.texts.evaluation is not None:
            with self.stopwatch.phase("evaluation"):
                evaluation = compare(
                    self.before, self._measure(self.texts.evaluation, "evaluate compressed")
                )
        parameters, size = model_sizes(self.model)
        predicted = predicted_rise(self.analysis.spectra, plan)
        return Report(
            model=str(getattr(getattr(self.model, "config", None), "_name_or_path", "") or "model"),
            config={k: v for k, v in decided.to_dict().items() if k != "ranks"},
            seed=self.config.seed,
            versions=versions(),
            parameters={
                "dense": self.sizes[0],
                "kept": parameters,
                "targeted_dense": plan.dense_parameters,
                "targeted_kept": plan.kept_parameters,
            },
            bytes={"dense": self.sizes[1], "kept": size},
            ranks=dict(plan.ranks),
            evaluation=evaluation,
            predicted_loss_difference=None if math.isnan(predicted) else predicted,
            seconds=dict(self.stopwatch.seconds),
            probes=[dataclasses.asdict(probe) for probe in probes],
            held_out=None if held_out is None else dataclasses.asdict(held_out),
            failures=self.analysis.failures,
            untouched=self.untouched,
            data={"calibration_tokens": self.analysis.tokens},
        )

    def _search(self) -> tuple[RankPlan, list[Probe], LossDifference | None]:
        held_out = self.texts.held_out or []
        reference = self._measure(held_out, "held-out text, dense").items
        differences: dict[float, LossDifference] = {}

        def measure(plan: RankPlan, tolerance: float) -> LossDifference:
            with factorized(self.model, self.analysis.spectra, plan):
                losses = iterate_losses(
                    self.model,
                    held_out,
                    loss_function=self.loss_function,
                    progress=f"held-out text, ratio {plan.param_ratio:.3f}"
                    if self.progress
                    else None,
                )
                found = paired_difference(reference, losses, stop_above=tolerance)
            differences[plan.param_ratio] = found
            return found

        smallest = smallest_ratio(self.analysis.plan_for_ratio)
        plan, probes = search_tolerance(
            self.analysis.plan_for_ratio,
            partial(predicted_rise, self.analysis.spectra),
            measure,
            self.config.effective_tolerance,
            smallest=smallest,
        )
        dense = LossDifference(0.0, 0.0, len(reference), True)
        return plan, probes, differences.get(plan.param_ratio, dense)

    def _measure(self, batches: Sequence[Batch], description: str) -> LossMeasurement:
        return measure_loss(
            self.model,
            batches,
            loss_function=self.loss_function,
            progress=description if self.progress else None,
        )


def smallest_ratio(plan_at: Callable[[float], RankPlan]) -> float:
    """A small `param_ratio` that the plan still accepts."""
    ratio = SMALLEST_RATIO
    while ratio < 1:
        try:
            plan_at(ratio)
        except ValueError:
            ratio *= 2
        else:
            return ratio
    return 1.0


def compare(before: LossMeasurement, after: LossMeasurement) -> Evaluation:
    """Before and after on the same items, with the paired difference."""
    difference = paired_difference(before.items, after.items)
    return Evaluation(
        perplexity_before=before.perplexity,
        perplexity_after=after.perplexity,
        loss_before=before.mean,
        loss_after=after.mean,
        loss_difference=difference.mean,
        standard_error=difference.standard_error,
        tokens=before.positions,
    )


def model_sizes(model: nn.Module) -> tuple[int, int]:
    """(parameters, bytes) of a model, each tied weight counted once."""
    parameters = list(model.parameters())  # tied weights appear once
    return (
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    )
