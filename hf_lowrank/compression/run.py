"""One compression from end to end: statistics, spectra, ranks, surgery, report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank.compression.analysis import (
    DEFAULT_MOMENT_GIB,
    Analysis,
    MomentReader,
    Stopwatch,
    analyze,
)
from hf_lowrank.compression.cache import RunCache
from hf_lowrank.compression.held_out import HeldOutLoss, check_fixed_ranks
from hf_lowrank.compression.prices import check_measurable, measure_parts, with_factors
from hf_lowrank.compression.recovery import (
    RecoveryResult,
    RecoverySettings,
    check_recoverable,
    recover_,
    recovery_settings,
)
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import ConfigError, DataError
from hf_lowrank.evaluation.perplexity import LossMeasurement, measure_loss
from hf_lowrank.evaluation.size import compare, model_sizes, size_fields
from hf_lowrank.evaluation.speed import speed_before_and_after
from hf_lowrank.format.modeling_lowrank import linear_shape
from hf_lowrank.measuring.distributed import current_processes
from hf_lowrank.measuring.losses import Batch, LossFunction, is_causal_lm
from hf_lowrank.modeling.marks import attach_config
from hf_lowrank.modeling.surgery import factorize_, swapped
from hf_lowrank.modeling.targets import find_targets, fixed_ranks, untouched_weights
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.ranks.rules import RULES
from hf_lowrank.ranks.searches.search import SEARCHES, search_plan
from hf_lowrank.ranks.threshold import check_budget, smallest_ratio
from hf_lowrank.ranks.tolerance import LossDifference, Probe, search_tolerance
from hf_lowrank.report.schema import Report, versions
from hf_lowrank.report.spectra import compact_spectra


@dataclass(frozen=True)
class Texts:
    """The disjoint sets of batches of a run.

    Attributes:
        calibration: For the moments.
        held_out: For the search of a loss tolerance or of ranks, and to correct prices.
        evaluation: For the report alone.
        foreign: For the report alone, too: text of a kind that calibration saw nothing of.
    """

    calibration: Sequence[Batch] | None = None
    held_out: Sequence[Batch] | None = None
    evaluation: Sequence[Batch] | None = None
    foreign: Sequence[Batch] | None = None

    def reported(self) -> dict[str, Sequence[Batch]]:
        """What the report measures, by the name of its field."""
        found = {"evaluation": self.evaluation, "foreign_evaluation": self.foreign}
        return {name: batches for name, batches in found.items() if batches is not None}


@dataclass(frozen=True)
class RunOptions:
    """How a run works, apart from what it decides.

    Attributes:
        loss_function: Loss of a batch; by default the model's own task loss.
        cache_dir: Folder for moments and spectra, to go on from after a kill.
        moment_gib: Memory for moments; more layers take more passes over the data.
        recover_steps: Steps of training the factors after the cut, towards the dense model.
        recover: What these steps train: "factors" (the default) or "lora", adapters on the
            factors that are merged into them.
        stages: In how many cuts a `param_ratio` is reached; after each the factors are trained for
            a part of the steps, and the next one starts from new moments. See stages.py.
        speed: Whether to time the model before and after, in turn, for the report; of causal
            language models only, see `speed_before_and_after`.
        progress: Whether to show progress bars.
    """

    loss_function: LossFunction | None = None
    cache_dir: str | Path | None = None
    moment_gib: float = DEFAULT_MOMENT_GIB
    recover_steps: int = 0
    recover: str | None = None
    stages: int = 1
    speed: bool = False
    progress: bool = True


def split_texts(config: LowRankConfig, texts: Texts, recover_steps: int = 0) -> Texts:
    """Takes held-out batches off the calibration batches where a search or a recovery needs them.

    Raises:
        DataError: They are needed and there is too little calibration data.
    """
    searches = config.searches and config.ranks is None
    is_needed = searches or recover_steps > 0
    if not is_needed or texts.held_out is not None:
        return texts
    batches = list(texts.calibration or [])
    if len(batches) < 2:
        raise DataError(
            "A loss tolerance is tested, ranks are searched, prices are corrected, and a recovery "
            "is judged on held-out text: pass at least two calibration batches, or held_out, or "
            "set param_ratio, a rule without a search, no measured_prices and no recover_steps."
        )
    size = max(1, len(batches) // 4)
    return dataclasses.replace(texts, calibration=batches[:-size], held_out=batches[-size:])


class CompressionRun:
    """One compression in progress: the analysis, and what was measured on the dense model.

    Args:
        model: The model.
        config: What to do.
        texts: Text by role.
        options: How to work; `stages` is not read here.
        dense: The original dense layers by name, if the model holds merged layers from an earlier
            stage.
        reader: See `analyze`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LowRankConfig,
        texts: Texts,
        options: RunOptions,
        dense: Mapping[str, nn.Module] | None = None,
        reader: MomentReader | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.texts = texts
        self.options = options
        self.recovery = recovery_settings(options.recover, options.recover_steps, config.seed)
        self.stopwatch = Stopwatch()
        self.processes = current_processes()
        targets = find_targets(model, config)
        self.dense = dict(dense or targets)
        check_goal(targets, config)
        if config.measured_prices and config.ranks is None:
            check_measurable(model, texts.held_out or [])
        if self.recovery:
            check_recoverable(model, texts.calibration or [], texts.held_out or [])
        self.untouched = untouched_weights(model, targets)
        self.sizes = model_sizes(model)
        cache = None
        if options.cache_dir is not None:
            cache = RunCache(
                Path(options.cache_dir),
                model,
                texts.calibration or [],
                config,
                options.loss_function,
            )
        self.analysis: Analysis = analyze(
            model,
            config,
            texts.calibration,
            loss_function=options.loss_function,
            cache=cache,
            stopwatch=self.stopwatch,
            moment_gib=options.moment_gib,
            progress=options.progress,
            processes=self.processes,
            reader=reader,
        )
        self._predicted = self.analysis  # with the prices as predicted
        self.parts: list[dict[str, Any]] = []
        self.before: dict[str, LossMeasurement] = {}
        if texts.reported():
            with self.stopwatch.phase("evaluation"), swapped(model, self.dense):
                self.before = self._measure_reported("evaluate dense")

    def use(self, config: LowRankConfig) -> None:
        """Goes on with another goal on the same spectra."""
        self.config = config
        self.analysis = dataclasses.replace(self._predicted, config=config)

    def choose(self) -> tuple[RankPlan, list[Probe], LossDifference | None]:
        """The plan that meets the goal, and for a tolerance how it was found."""
        config = self.config
        if config.measured_prices and config.ranks is None:
            with self.stopwatch.phase("prices"):
                self._measure_prices()
        with self.stopwatch.phase("ranks"):
            if config.ranks is not None:
                narrowed = {name: (out, n) for name, (out, n) in (config.narrowed or {}).items()}
                return RankPlan(config.ranks, self.analysis.shapes, narrowed), [], None
            if config.param_ratio is not None and config.effective_rule in RULES:
                return self.analysis.plan_for_ratio(config.param_ratio), [], None
            if config.rank is not None:
                return self.analysis.plan_for_rank(config.rank), [], None
        with self.stopwatch.phase("search"):
            if config.param_ratio is not None:
                return self.processes.decide((self._search_ranks(config.param_ratio), [], None))
            return self.processes.decide(self._search())

    def _measure_prices(self) -> None:
        """Corrects the prices by what the plan that they propose does, part by part."""
        config, analysis = self.config, self.analysis
        ratio = config.param_ratio
        if ratio is None:
            ratio = _likely_ratio(analysis, config.effective_tolerance)
        plan = analysis.plan_for_ratio(ratio)
        held_out = self.texts.held_out or []
        found = measure_parts(self.model, analysis, plan, held_out, self.options.progress)
        self.parts = self.processes.decide(found)
        self.analysis = with_factors(analysis, self.parts)

    def apply(self, plan: RankPlan, probes: list[Probe], held_out: LossDifference | None) -> Report:
        """Puts the plan into the model, measures it and reports."""
        with self.stopwatch.phase("surgery"):
            analysis = self.analysis
            is_cut = bool(factorize_(self.model, analysis.spectra, plan, analysis.orders))
            narrowed = {name: list(shape) for name, shape in plan.narrowed.items()} or None
            decided = self.config.replace(ranks=dict(plan.ranks), narrowed=narrowed, form="factors")
            attach_config(self.model, decided)
        recovery = self._recover(self.recovery) if self.recovery else None
        evaluations = {}
        if self.before:
            with self.stopwatch.phase("evaluation"):
                after = self._measure_reported("evaluate compressed")
            evaluations = {name: compare(self.before[name], after[name]) for name in after}
        speed = self._speed() if is_cut else None
        predicted = analysis.predicted_rise(plan)
        return Report(
            model=str(getattr(getattr(self.model, "config", None), "_name_or_path", "") or "model"),
            config={k: v for k, v in decided.to_dict().items() if k not in ("ranks", "narrowed")},
            seed=self.config.seed,
            versions=versions(),
            **size_fields(self.sizes, self.model, plan),
            evaluation=evaluations.get("evaluation"),
            foreign_evaluation=evaluations.get("foreign_evaluation"),
            speed=speed,
            predicted_loss_difference=None if math.isnan(predicted) else predicted,
            seconds=dict(self.stopwatch.seconds),
            probes=[dataclasses.asdict(probe) for probe in probes],
            held_out=None if held_out is None else dataclasses.asdict(held_out),
            recovery=None if recovery is None else dataclasses.asdict(recovery),
            measured_prices=self.parts,
            failures=self.analysis.failures,
            untouched=self.untouched,
            data={"calibration_tokens": self.analysis.tokens},
            architecture=type(self.model).__name__,
            spectra=compact_spectra(self.analysis.spectra),
        )

    def _recover(self, settings: RecoverySettings) -> RecoveryResult:
        with self.stopwatch.phase("recovery"):
            return recover_(
                self.model,
                self.dense,
                self.texts.calibration or [],
                self.texts.held_out or [],
                settings,
                self.options.progress,
            )

    def _speed(self) -> dict[str, Any] | None:
        """Timed by the main process while the others wait, so that they do not disturb it."""
        if not (self.options.speed and is_causal_lm(self.model)):
            return None
        with self.stopwatch.phase("speed"):
            is_main = self.processes.is_main
            return self.processes.decide(
                speed_before_and_after(self.model, self.dense) if is_main else None
            )

    def held_out_loss(self) -> HeldOutLoss:
        """Measures plans on the held-out batches."""
        return HeldOutLoss(
            self.model,
            self.texts.held_out or [],
            self.options.loss_function,
            self.options.progress,
        )

    def _search_ranks(self, param_ratio: float) -> RankPlan:
        """Ranks by one of the searches of `SEARCHES`."""
        held_out, analysis = self.held_out_loss(), self.analysis
        return search_plan(
            self.config.effective_rule,
            analysis.shapes,
            analysis.spectra,
            param_ratio,
            measure=lambda plan: held_out.difference(analysis.spectra, plan).mean,
            trials=self.config.search_trials,
            seed=self.config.seed,
            min_rank=self.config.min_rank,
            fixed=analysis.fixed,
        )

    def _search(self) -> tuple[RankPlan, list[Probe], LossDifference | None]:
        held_out, analysis = self.held_out_loss(), self.analysis
        differences: dict[float, LossDifference] = {}

        def measure(plan: RankPlan, tolerance: float) -> LossDifference:
            found = held_out.difference(analysis.spectra, plan, tolerance, analysis.orders)
            differences[plan.param_ratio] = found
            return found

        tolerance = self.config.effective_tolerance
        largest = analysis.plan_for_ratio(1.0)
        check_fixed_ranks(held_out, analysis.spectra, largest, tolerance)
        smallest = smallest_ratio(
            analysis.shapes, min_rank=self.config.min_rank, fixed=analysis.fixed
        )
        plan, probes = search_tolerance(
            analysis.plan_for_ratio,
            analysis.predicted_rise,
            measure,
            tolerance,
            smallest=smallest,
        )
        dense = LossDifference(0.0, 0.0, len(held_out.dense.items), True)
        return plan, probes, differences.get(plan.param_ratio, dense)

    def _measure_reported(self, description: str) -> dict[str, LossMeasurement]:
        return {
            name: measure_loss(
                self.model,
                batches,
                loss_function=self.options.loss_function,
                progress=description if self.options.progress else None,
            )
            for name, batches in self.texts.reported().items()
        }


def _likely_ratio(analysis: Analysis, tolerance: float) -> float:
    """About the size at which the predicted rise is a tolerance, or a hundredth of a nat."""
    low, high = (
        smallest_ratio(analysis.shapes, min_rank=analysis.config.min_rank, fixed=analysis.fixed),
        1.0,
    )
    while high - low > 0.01:
        middle = (low + high) / 2
        rise = analysis.predicted_rise(analysis.plan_for_ratio(middle))
        low, high = (low, middle) if rise <= max(tolerance, 0.01) else (middle, high)
    return high


def check_goal(targets: Mapping[str, nn.Module], config: LowRankConfig) -> None:
    """Refuses a goal that can't be met, before any long work.

    Raises:
        ConfigError: Even the smallest ranks exceed `param_ratio`, with the parameters allowed and
            needed; a search of ranks is asked for a loss tolerance; or narrowed layers are to be
            made without `channels`.
    """
    if config.narrowed and not config.channels:
        raise ConfigError("To make the narrowed layers of a config again, set channels=True.")
    if config.effective_rule in SEARCHES and config.goal != "param_ratio" and not config.ranks:
        raise ConfigError(f"rule {config.rule!r} searches ranks for a size; set param_ratio.")
    if config.param_ratio is not None:
        shapes = {name: linear_shape(layer) for name, layer in targets.items()}
        fixed = fixed_ranks(targets, config)
        check_budget(shapes, config.param_ratio, min_rank=config.min_rank, fixed=fixed)
