"""A table of runs: every method on every task and size; a killed run goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.cost import counted_everywhere
from benchmarks.figures import draw_ranks
from benchmarks.glue_figure import draw_sizes
from benchmarks.row_cost import format_costs, known_costs
from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError, LowRankError
from hf_lowrank.report.provenance import write_result
from hf_lowrank.tasks.fine_tuning import dense_model
from hf_lowrank.tasks.task import Task
from hf_lowrank.tasks.task_arguments import LPAF_VARIANTS, METHOD_NAMES, TaskArguments
from hf_lowrank.tasks.task_report import main_score
from hf_lowrank.tasks.task_run import run_task

Row = TypeVar("Row", bound=TaskArguments)

# Settings that may differ between the rows of one folder, or do not touch a figure.
_FREE = {"output_dir", "cache_dir", "data_dir", "task", "method", "param_ratio", "seed", "model"}


@dataclass
class TableArguments:
    """Arguments of a table besides those of one run, which apply to all rows."""

    methods: list[str] | None = option(None, "Methods; default all.")
    param_ratios: list[float] | None = option(None, "Sizes; default 0.25.")
    seeds: list[int] | None = option(None, "Seeds; default 0.")
    folder: str = option("outputs/table", "Folder of rows, a JSON file for each finished one.")
    workers: int = option(1, "Rows that run side by side.")
    picture: str | None = option(
        None, "SVG file for a picture of the ranks in the rows asked for, those of the first seed."
    )
    size_picture: str | None = option(
        None,
        "SVG file for a picture of score by size: all finished rows of the methods asked for, a "
        "panel for each of the folder's tasks that has several sizes.",
    )


def fill_table(
    args: TableArguments, tasks: Sequence[str], settings: Row, load_task: Callable[[Row], Task]
) -> None:
    """Runs the rows that are missing, then prints all rows of the folder.

    Args:
        args: Which rows, and where they are kept.
        tasks: Names of tasks.
        settings: Arguments that apply to all rows.
        load_task: Makes the task of a row; a function of a module, for the worker processes.

    Raises:
        ConfigError, DataError: A setting of a row is refused.
    """
    folder = Path(args.folder)
    grid = Grid(tasks, args.methods or METHOD_NAMES, args.param_ratios or [0.25], args.seeds or [0])
    run_rows(grid.rows(settings), load_task, folder, args.workers)
    rows = read_rows(folder)
    print(format_table(rows))
    print(format_shares(rows))
    if costs := format_costs(rows):
        print(costs)
    if args.picture:
        wanted = {
            (task, method, ratio, grid.seeds[0])
            for task in tasks
            for method in grid.methods
            for ratio in grid.param_ratios
        }
        keys = ("task", "method", "param_ratio", "seed")
        drawn = [row for row in rows if tuple(row[key] for key in keys) in wanted]
        draw_ranks(drawn, Path(args.picture))
    if args.size_picture:
        drawn = [row for row in rows if row["method"] in {*grid.methods, "dense"}]
        draw_sizes([row for row in drawn if "refusal" not in row], Path(args.size_picture))


def part_of(args: Any, kind: type[Row]) -> Row:  # noqa: ANN401
    """The fields of larger arguments that those of one run have."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


@dataclass(frozen=True)
class Grid:
    """Rows to run: the product of all fields, the dense row once for each task and seed."""

    tasks: Sequence[str]
    methods: Sequence[str]
    param_ratios: Sequence[float]
    seeds: Sequence[int]

    def rows(self, settings: Row) -> list[Row]:
        """Arguments of each row, those of the first seed first.

        Raises:
            ConfigError, DataError: A setting of a row is refused.
        """
        found = []
        for seed in self.seeds:
            for task in self.tasks:
                for method in self.methods:
                    for ratio in self.param_ratios if method != "dense" else [None]:
                        row = dataclasses.replace(
                            settings, task=task, method=method, param_ratio=ratio, seed=seed
                        )
                        row.check()
                        found.append(row)
        return found


def run_rows(
    rows: Iterable[Row], load_task: Callable[[Row], Task], folder: Path, workers: int
) -> None:
    """Runs the rows that the folder lacks, each in one thread of a worker process.

    Args:
        rows: What to run.
        load_task: Makes the task of a row; a function of a module.
        folder: Gets one JSON file for each row, written when the row is finished.
        workers: Rows that run side by side.

    Raises:
        ConfigError: The folder holds a row that was run with other settings.
    """
    missing = [row for row in rows if not _is_done(row, folder)]
    threads = max(1, _usable_cores() // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,)) as pool:
        firsts = {(row.task, row.seed): row for row in missing}.values()
        list(pool.map(partial(_prepare, load_task), firsts))
        jobs = {pool.submit(_run_and_tell, row, load_task, folder): row for row in missing}
        for number, done in enumerate(as_completed(jobs), 1):
            print(f"[{number}/{len(jobs)}] {done.result()}", flush=True)


def _usable_cores() -> int:
    """Cores that this process may run on, where the system tells; else all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The finished rows of a folder."""
    rows = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    return [row | {"param_ratio": row["arguments"]["param_ratio"]} for row in rows]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: before -> after fine-tuning, in percent, mean and spread over the seeds.

    LPAF's rows begin with the pruned model; where seeds were refused by its gate, that is all there
    is of them, and their number is told.
    """
    rows = [*_dense_rows(rows), *rows]
    columns = sorted(
        {(r["task"], r["param_ratio"]) for r in rows if r["param_ratio"] is not None},
        key=lambda column: (-column[1], column[0]),
    )
    lines = [["method", *(f"{task} {ratio:g}" for task, ratio in columns)]]
    lines.append(["---", *("---:" for _ in columns)])
    present = {row["method"] for row in rows}
    known = [name for name in METHOD_NAMES if name in present]
    for method in [*known, *sorted(present.difference(known))]:  # the last are no more
        cells = []
        for task, ratio in columns:
            wanted = None if method == "dense" else ratio
            cells.append(
                _cell(
                    [
                        row
                        for row in rows
                        if (row["task"], row["method"], row["param_ratio"])
                        == (task, method, wanted)
                    ]
                )
            )
        lines.append([method, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_shares(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each method, task and size: mean score over mean dense score, in percent.

    Where ranks were selected while training, also the selections' share of the time, by seed.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["param_ratio"] is not None and "dense_metrics" in row and "refusal" not in row:
            key = (row["task"], row["param_ratio"], row["method"])
            groups.setdefault(key, []).append(row)
    lines = []
    for (task, ratio, method), group in groups.items():
        kept, dense = (
            sum(main_score(row[name]) for row in group) for name in ("metrics", "dense_metrics")
        )
        line = f"{task} {ratio:g} {method}: {100 * kept / dense:.1f} % of dense"
        times = [row["seconds"] for row in group if "selections" in row]
        shares = ", ".join(f"{100 * t['selection'] / t['train']:.1f} %" for t in times)
        lines.append(f"{line}, selections {shares} of the training time" if shares else line)
    return "\n".join(lines)


def _dense_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The dense score of each task and seed that has no dense row of its own."""
    there = {(row["task"], row["seed"]) for row in rows if row["method"] == "dense"}
    others = {(r["task"], r["seed"]): r for r in rows if "dense_metrics" in r}
    return [
        {
            "task": task,
            "method": "dense",
            "param_ratio": None,
            "uncured_metrics": row["dense_metrics"],
        }
        for (task, seed), row in others.items()
        if (task, seed) not in there
    ]


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    kept = [row for row in rows if "refusal" not in row]
    parts = []
    for name, of in (("pruned_metrics", rows), ("uncured_metrics", kept), ("metrics", kept)):
        scores = [100 * main_score(row[name]) for row in of if name in row]
        if scores:
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            parts.append(f"{statistics.fmean(scores):.1f}{spread}")
    if refused := len(rows) - len(kept):
        parts.append(f"{refused} of {len(rows)} refused")
    return " → ".join(parts)


def _path(row: TaskArguments, folder: Path) -> Path:
    size = "" if row.param_ratio is None else f"-{row.param_ratio:g}"
    return folder / f"{row.task}-{row.method}{size}-seed{row.seed}.json"


def _is_done(row: TaskArguments, folder: Path) -> bool:
    path = _path(row, folder)
    if not path.is_file():
        return False
    # Rows from before there was a choice hold two factors and had no teacher and no gate.
    older = {"form": "factors", "steps": 0, "distillation_weight": 0.0}
    older |= {"gate": 0.0} if row.method in LPAF_VARIANTS else {}
    found = older | json.loads(path.read_text("utf-8"))["arguments"]
    for name, value in vars(row).items():
        if name not in _FREE and name in found and found[name] != value:
            raise ConfigError(
                f"{path}: was run with {name} {found[name]}, not {value}; give another --folder "
                "or delete the file."
            )
    return True


def _prepare(load_task: Callable[[Row], Task], row: Row) -> None:
    """The dense model of a task and seed, so that workers do not train it side by side."""
    dense_model(load_task(row), row)


def run_row(row: Row, load_task: Callable[[Row], Task], folder: Path) -> dict[str, Any]:
    """The report of a row: from its file, or run and written there.

    A row that is run gets a `cost`: `seconds` of the whole run, its evaluations included;
    `forwards` and `backwards`, the sequences that went through its model in training, calibration,
    rank selection and evaluation (`counted_everywhere`); `peak_mib`; and where they are known
    `decompositions`, the matrices that it took ranks from. The dense model is trained before the
    counting begins. What earlier rows left in the cache folder (spectra, LPAF's stages) is read and
    so costs no passes; `restored` names the stages of LPAF that were.

    Raises:
        ConfigError: The file is of other settings.
    """
    path = _path(row, folder)
    if not _is_done(row, folder):
        task = load_task(row)
        dense_model(task, row)
        with counted_everywhere() as cost:
            _, report = run_task(task, row)
        spent = dataclasses.asdict(cost) | known_costs(report)
        write_result(path, report.to_dict() | {"cost": spent})
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _run_and_tell(row: Row, load_task: Callable[[Row], Task], folder: Path) -> str:
    """Runs a row in a worker; returns a line about it."""
    name = _path(row, folder).stem
    try:
        report = run_row(row, load_task, folder)
    except LowRankError as error:
        return f"{name}: failed: {error}"
    refusal = f"; {report['refusal']}" if "refusal" in report else ""
    seconds = sum(report["seconds"].values())
    return f"{name}: {main_score(report['metrics']):.4f} in {seconds:.0f} s{refusal}"
