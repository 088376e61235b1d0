"""Every system on one model, one calibration set, one list of sizes; row by row, resumable."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.catalogue import JOINT, RANKED, STRUCTURED, System, select_systems
from benchmarks.cost import Cost, counted
from benchmarks.searches.search import search_plan
from benchmarks.structured.methods import METHODS, Dense
from benchmarks.system_rows import claim, read_row, row_path
from benchmarks.system_tables import format_row
from hf_lowrank.compression.analysis import Analysis, analyze
from hf_lowrank.compression.held_out import HeldOutLoss
from hf_lowrank.compression.joint.disjoint import check_disjoint
from hf_lowrank.compression.joint.system import compress_jointly
from hf_lowrank.compression.options import Run, Texts
from hf_lowrank.compression.prices import enough, measure_prices, model_parts
from hf_lowrank.config import LowRankConfig
from hf_lowrank.errors import LowRankError
from hf_lowrank.evaluation.perplexity import LossMeasurement, measure_loss
from hf_lowrank.evaluation.size import compare
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.measuring.collection import collect_moments
from hf_lowrank.measuring.items import Batch
from hf_lowrank.modeling.marks import attach_config_
from hf_lowrank.modeling.surgery import factorize_, restore_, swapped
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.ranks.plan import RankPlan
from hf_lowrank.report.provenance import write_result

Ranks = tuple[tuple[str, int | None], ...]
# The sensitivity search cuts every layer at every size by itself; all held-out text takes hours.
SENSITIVITY_BATCHES = 1
TRIALS = 24


@dataclass(frozen=True)
class BenchmarkTexts:
    """The disjoint sets of a comparison.

    Attributes:
        calibration: For the moments, and for the joint system's gradient.
        held_out: For searches that measure losses, and for the joint system's acceptance.
        evaluation: Batches by the name of the text; only for the reported figures.
    """

    calibration: Sequence[Batch]
    held_out: Sequence[Batch]
    evaluation: Mapping[str, Sequence[Batch]]


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is compared.

    Attributes:
        param_ratios: Sizes.
        systems: Names of systems; all if empty.
        trials: Plans that a search may measure.
        seed: Seed of everything random.
    """

    param_ratios: Sequence[float]
    systems: Sequence[str] = ()
    trials: int = TRIALS
    seed: int = 0


def compare_systems(
    model: nn.Module,
    texts: BenchmarkTexts,
    options: BenchmarkOptions,
    folder: Path,
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Measures every system at every size, and writes each row into the folder as it comes.

    Args:
        model: The dense model; it is dense again afterwards.
        texts: Text by role.
        options: What is compared.
        folder: Where rows are; rows that are there are not measured again.
        settings: What else the rows depend on (names of model and texts, ...).

    Returns:
        All rows asked for, in the order of systems and sizes. `read_rows` has all of the folder,
        which other processes may fill with other systems at the same time.

    Raises:
        ConfigError: A system is unknown, or the folder holds rows of other settings.
        DataError: Two texts share an item.
        StorageError: A row's file is damaged.
    """
    systems = select_systems(options.systems)
    check_disjoint(calibration=texts.calibration, held_out=texts.held_out, **texts.evaluation)
    claim(folder, dict(settings) | {"trials": options.trials, "seed": options.seed})
    bench = _Bench(model, texts, options)
    rows = []
    for system in sorted(systems, key=lambda each: _metric_order(systems, each)):
        for ratio in options.param_ratios:
            path = row_path(folder, system.name, ratio)
            if not path.exists():
                write_result(path, bench.row(system, ratio))
            rows.append(read_row(path))
            print(format_row(rows[-1]), flush=True)
    return rows


class _Bench:
    """What rows share: dense losses, and the spectra of the metric at hand."""

    def __init__(self, model: nn.Module, texts: BenchmarkTexts, options: BenchmarkOptions) -> None:
        self.model = model
        self.texts = texts
        self.options = options
        self._analysis: tuple[Analysis, Cost] | None = None
        self._known: dict[tuple[str, int], dict[Ranks, tuple[float, Cost]]] = {}
        self._makers = {RANKED: self._ranked, JOINT: self._joint, STRUCTURED: self._structured}

    @cached_property
    def dense(self) -> dict[str, LossMeasurement]:
        """Losses of the dense model by text."""
        return {
            name: measure_loss(self.model, batches, progress=f"evaluate dense, {name}")
            for name, batches in self.texts.evaluation.items()
        }

    def row(self, system: System, param_ratio: float) -> dict[str, Any]:
        """One system at one size; an expected error becomes part of the row."""
        row: dict[str, Any] = dataclasses.asdict(system) | {"param_ratio": param_ratio}
        assert self.dense is not None  # measured while the model is dense
        try:
            return row | self._makers[system.kind](system, param_ratio)
        except LowRankError as error:
            return row | {"error": str(error)}

    def _ranked(self, system: System, param_ratio: float) -> dict[str, Any]:
        analysis, cost = self._analyze(system)
        batches = self.texts.held_out
        if system.rule == "sensitivity":
            batches = batches[:SENSITIVITY_BATCHES]
        known = self._known.setdefault((system.metric, len(batches)), {})
        saved = Cost()
        with counted(self.model) as search:
            held_out = HeldOutLoss(self.model, batches)

            def measure(plan: RankPlan) -> float:
                nonlocal saved
                key = tuple(plan.ranks.items())
                if key in known:  # by another row: its cost counts for this one, too
                    saved += known[key][1]
                    return known[key][0]
                start, forwards = time.perf_counter(), search.forwards
                loss = held_out.difference(analysis.factors, plan).mean
                spent = Cost(time.perf_counter() - start, search.forwards - forwards)
                known[key] = loss, spent
                return loss

            if system.measured or system.channels:
                if system.measured:
                    analysis = self._priced(analysis, param_ratio)
                plan = analysis.plan_for_ratio(param_ratio)
            else:
                plan = search_plan(
                    system.rule,
                    analysis.shapes,
                    analysis.spectra,
                    param_ratio,
                    measure=measure,
                    trials=self.options.trials,
                    seed=self.options.seed,
                    **analysis.limits,
                )
        search += saved
        with counted(self.model) as surgery:
            originals = factorize_(self.model, analysis.factors, plan, analysis.orders)
        found = _cost_fields(cost + search + surgery) | {"search_seconds": search.seconds}
        found["decompositions"] = len(analysis.spectra)
        try:
            return found | self._quality(analysis.shapes)
        finally:
            restore_(self.model, originals)

    def _priced(self, analysis: Analysis, param_ratio: float) -> Analysis:
        """The same with prices from held-out text."""
        held_out = measure_prices(
            self.model,
            analysis.factors,
            analysis.orders,
            enough(self.texts.held_out),
            seed=self.options.seed,
        )
        plan = analysis.plan_for_ratio(param_ratio)
        parts = model_parts(self.model, plan.ranks)
        return dataclasses.replace(analysis, held_out=held_out).priced(plan, parts)[0]

    def _joint(self, system: System, param_ratio: float) -> dict[str, Any]:
        config = LowRankConfig(param_ratio=param_ratio, seed=self.options.seed, form=system.form)
        originals = find_targets(self.model, config)
        try:
            with counted(self.model) as cost:
                report = compress_jointly(
                    self.model, config, self.texts.calibration, self.texts.held_out
                )
            assert report.joint is not None  # as of every joint compression
            analysis_seconds = sum(
                report.seconds.get(phase, 0.0) for phase in ("statistics", "decomposition")
            )
            found = _cost_fields(cost) | {"search_seconds": cost.seconds - analysis_seconds}
            tried = dataclasses.asdict(report.joint)
            found |= {name: tried[name] for name in ("decompositions", "method", "trials")}
            return found | self._quality({n: linear_shape(m) for n, m in originals.items()})
        finally:
            restore_(self.model, originals)
            attach_config_(self.model, None)

    def _structured(self, system: System, param_ratio: float) -> dict[str, Any]:
        method = METHODS[system.name]
        targets = find_targets(self.model, LowRankConfig(param_ratio=param_ratio))
        shapes = {name: linear_shape(layer) for name, layer in targets.items()}
        self._analysis = None  # frees the spectra: whole moments are large
        with counted(self.model) as cost:
            moments = {}
            if method.needs:
                moments = collect_moments(self.model, targets, self.texts.calibration, method.needs)
            built = method.build(
                Dense(self.model, targets, moments), param_ratio, self.options.seed
            )
        found = _cost_fields(cost) | {"search_seconds": 0.0}
        found["decompositions"] = built.decompositions
        with swapped(self.model, built.layers):
            return found | self._quality(shapes)

    def _analyze(self, system: System) -> tuple[Analysis, Cost]:
        """Spectra in a system's metric; those of the system before are forgotten."""
        config = LowRankConfig(
            param_ratio=1.0,
            metric=system.metric,
            channels=system.channels,
            seed=self.options.seed,
            form="factors",  # whatever the form, the spectra are the same
        )
        if self._analysis is None or self._analysis[0].config != config:
            self._analysis = None
            with counted(self.model) as cost:
                targets = find_targets(self.model, config)
                run = Run(Texts(self.texts.calibration))
                found = analyze(self.model, targets, config, run)
            self._analysis = found, cost
        found, cost = self._analysis
        return found.with_config(config.replace(form=system.form)), cost

    def _quality(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
        """Weights counted from the model as it is, a shared one once, and its losses."""
        weights = (
            weight
            for name in shapes
            for weight in self.model.get_submodule(name).parameters()
            if weight.ndim == 2
        )
        found: dict[str, Any] = {
            "kept_parameters": sum({id(weight): weight.numel() for weight in weights}.values()),
            "dense_parameters": sum(rows * columns for rows, columns in shapes.values()),
        }
        for name, batches in self.texts.evaluation.items():
            after = measure_loss(self.model, batches, progress=f"evaluate, {name}")
            found[name] = dataclasses.asdict(compare(self.dense[name], after))
        return found


def _cost_fields(cost: Cost) -> dict[str, Any]:
    """The cost's fields, seconds under a name that says that they are all of them."""
    fields = dataclasses.asdict(cost)
    return {"total_seconds": fields.pop("seconds")} | fields


def _metric_order(systems: Sequence[System], system: System) -> int:
    """Systems of one metric next to each other, so that its spectra are made once."""
    return [each.metric for each in systems].index(system.metric)
