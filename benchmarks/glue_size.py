"""The smallest size at which a method keeps a share of the dense score, by bisection.

Only the held-out part of the training set is looked at while searching; the development set is
scored once, at the size found.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.glue import GlueTableArguments
from benchmarks.table import part_of, run_row
from hf_lowrank.compression.analysis import analyze
from hf_lowrank.compression.options import Run, RunOptions, Texts
from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.modeling.surgery import factorized
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.ranks.threshold import smallest_ratio
from hf_lowrank.report.provenance import write_result
from hf_lowrank.tasks.fine_tuning import SPECTRA_FOLDER, dense_model
from hf_lowrank.tasks.glue import GlueArguments, load_glue_task
from hf_lowrank.tasks.methods import cut_config
from hf_lowrank.tasks.task import Task
from hf_lowrank.tasks.task_arguments import CUTS
from hf_lowrank.tasks.task_report import main_score

Probe = dict[str, Any]


@dataclass
class GlueSizeArguments(GlueTableArguments):
    """Arguments of the search for the smallest size; `epochs` 0 judges the cut itself."""

    share: float = option(0.99, "Share of the dense score to keep on the held-out examples.")
    output: str = option("outputs/glue-size.json", "JSON file with the sizes found.")


def find_smallest_sizes(args: GlueSizeArguments) -> None:
    """The smallest size of each method on each task."""
    settings, rows = part_of(args, GlueArguments), []
    for task in args.tasks or ["mrpc"]:
        one = dataclasses.replace(settings, task=task)
        methods = args.methods or list(CUTS)
        if args.epochs <= 0 and (unknown := [name for name in methods if name not in CUTS]):
            raise ConfigError(
                f"With epochs 0 the methods are {', '.join(CUTS)}; got {', '.join(unknown)}."
            )
        rows += smallest_sizes(one, methods, args.share, Path(args.folder))
        write_result(Path(args.output), {"arguments": vars(args), "rows": rows})


def smallest_sizes(
    args: GlueArguments, methods: Sequence[str], share: float, folder: Path
) -> list[dict[str, Any]]:
    """One row for each method.

    Args:
        args: Task and settings; with `epochs` 0 the cut itself is judged, else the result of
            fine-tuning after it or with it.
        methods: Names of methods.
        share: Share of the dense score to keep on the held-out examples.
        folder: Keeps the runs of each probe, so that a killed search goes on.

    Returns:
        `task`, `method`, `epochs`, `share`, `dense_score`, `param_ratio` found, its `score` on the
        development set, and the `probes` with their scores on the held-out examples.
    """
    task = load_glue_task(args)
    model = dense_model(task, args)
    rows = []
    for method in methods:
        if args.epochs > 0:
            found = _with_training(
                task, model, dataclasses.replace(args, method=method), share, folder
            )
        else:
            found = _without_training(task, model, args, CUTS[method], share)
        rows.append({"task": task.name, "method": method, "epochs": args.epochs, **found})
        size = found["param_ratio"]
        print(f"{task.name} {method}: {size:.3f}, score {found['score']:.4f}", flush=True)
    return rows


def bisect_size(
    measure: Callable[[float], float], wanted: float, floor: float, precision: float = 1.1
) -> tuple[float, list[Probe]]:
    """The smallest size with a score of at least `wanted` that bisection finds; 1 is dense.

    Args:
        measure: Score at a size.
        wanted: Score to reach.
        floor: Smallest size to try.
        precision: The search stops when the bracket's ends are within this factor.
    """
    feasible, infeasible = 1.0, floor
    probes: list[Probe] = []
    while feasible / infeasible > precision:
        ratio = math.sqrt(feasible * infeasible)
        score = measure(ratio)
        probes.append({"param_ratio": ratio, "score": score, "feasible": score >= wanted})
        if score >= wanted:
            feasible = ratio
        else:
            infeasible = ratio
    return feasible, probes


def _without_training(
    task: Task, model: nn.Module, args: GlueArguments, cut: Mapping[str, Any], share: float
) -> dict[str, Any]:
    config = cut_config(dataclasses.replace(args, param_ratio=1.0, loss_tolerance=None), **cut)
    batches = task.batches(task.train, args.batch_size, args.calibration_samples)
    options = RunOptions(cache_dir=Path(args.cache_dir) / SPECTRA_FOLDER, progress=False)
    targets = find_targets(model, config)
    analysis = analyze(model, targets, config, Run(Texts(batches), options))

    def score(ratio: float, split: Any) -> float:  # noqa: ANN401
        plan = analysis.plan_for_ratio(ratio)
        with factorized(model, analysis.factors, plan, analysis.orders):
            return main_score(task.score(model, split))

    dense = main_score(task.score(model, task.held_out))
    floor = max(0.02, smallest_ratio(analysis.shapes, **analysis.limits))
    ratio, probes = bisect_size(lambda r: score(r, task.held_out), share * dense, floor)
    return {
        "share": share,
        "dense_score": main_score(task.score(model, task.validation)),
        "param_ratio": ratio,
        "score": score(ratio, task.validation),
        "probes": probes,
    }


def _with_training(
    task: Task, model: nn.Module, args: GlueArguments, share: float, folder: Path
) -> dict[str, Any]:
    reports: dict[float, dict[str, Any]] = {}

    def measure(ratio: float) -> float:
        reports[ratio] = run_row(
            dataclasses.replace(args, param_ratio=ratio), load_glue_task, folder
        )
        return main_score(reports[ratio]["held_out_metrics"])

    dense = main_score(task.score(model, task.held_out))
    ratio, probes = bisect_size(measure, share * dense, 0.02, precision=1.3)
    dense_score = main_score(task.score(model, task.validation))
    score = main_score(reports[ratio]["metrics"]) if ratio in reports else dense_score
    return {
        "share": share,
        "dense_score": dense_score,
        "param_ratio": ratio,
        "score": score,
        "probes": probes,
    }
