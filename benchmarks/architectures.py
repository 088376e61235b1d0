"""Every class of transformers' task mappings, tiny, through a whole compression and back.

Each runs in a process of its own with limits of time and memory, so that no class ends the sweep.
"""

from __future__ import annotations

import collections
import json
import os
import pickle
import resource
import signal
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from benchmarks.architecture_table import format_page
from benchmarks.round_trip import RECIPES, Case, Trip, round_trip
from benchmarks.tiny_batches import TASKS
from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError
from hf_lowrank.files import write_text
from hf_lowrank.report.provenance import commit, write_result
from hf_lowrank.value_checks import check_choice, check_count, check_positive

_WALL = 10  # seconds by the clock for each second of the processor: machines are shared
_GIB = 2**30


@dataclass
class ArchitecturesArguments:
    """Arguments of the sweep over the classes of transformers."""

    tasks: list[str] | None = option(None, f"Tasks; default all: {', '.join(TASKS)}.")
    classes: list[str] | None = option(None, "Names of classes or model types; default all.")
    seconds: int = option(60, "Processor time for each compression, seconds.")
    memory_gib: float = option(6.0, "Memory that each may take, GiB.")
    again: list[str] | None = option(
        None, "Outcomes in the file that are tried again, such as failed and untried."
    )
    output: str = option(
        "outputs/architectures.json", "JSON file of the rows; those in it are kept."
    )
    page: str | None = option(None, "Markdown file for the table.")

    def check(self) -> None:
        """Refuses what leaves nothing to try.

        Raises:
            ConfigError: A limit below 1, an unknown task, or a name of no class.
        """
        check_count("seconds", self.seconds)
        check_positive("memory_gib", self.memory_gib)
        for task in self.tasks or ():
            check_choice("tasks", task, TASKS)
        known = {name for case in all_cases(TASKS) for name in (case.model_type, case.model_class)}
        for name in self.classes or ():
            if name not in known:
                raise ConfigError(f"classes: transformers has no {name!r} in these mappings.")


def all_cases(tasks: Iterable[str]) -> list[Case]:
    """One class for each model type of each task."""
    cases = []
    for task in tasks:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        for model_type, listed in names.items():
            first = listed if isinstance(listed, str) else listed[0]
            cases.append(Case(task, model_type, first))
    return cases


def sweep_architectures(args: ArchitecturesArguments) -> None:
    """Tries what is not yet in the file, and writes file and page."""
    args.check()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    wanted = set(args.classes or ())
    rows = _read_rows(Path(args.output))
    for case in all_cases(args.tasks or TASKS):
        if wanted and not wanted & {case.model_type, case.model_class}:
            continue
        if _is_done(rows.get(case), args.again or ()):
            continue
        rows[case] = {
            recipe: asdict(apart(case, recipe, args.seconds, args.memory_gib)) for recipe in RECIPES
        } | {"commit": commit()}
        shown = ", ".join(f"{name} {rows[case][name]['outcome']}" for name in RECIPES)
        print(f"{case.task} {case.model_class} ({case.model_type}): {shown}", flush=True)
        _write(args, rows)
    _write(args, rows)


def _is_done(row: dict[str, Any] | None, again: Sequence[str]) -> bool:
    return row is not None and not any(row[name]["outcome"] in again for name in RECIPES)


def _read_rows(path: Path) -> dict[Case, dict[str, Any]]:
    """The rows of a sweep that was stopped, each with the commit that it is of."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text("utf-8"))
    return {
        Case(row["task"], row["model_type"], row["model_class"]): {
            recipe: row[recipe] for recipe in RECIPES
        }
        | {"commit": row.get("commit", found["commit"])}
        for row in found["rows"]
    }


def _write(args: ArchitecturesArguments, rows: dict[Case, dict[str, Any]]) -> None:
    listed = [asdict(case) | trips for case, trips in rows.items()]
    counts = {
        recipe: dict(collections.Counter(row[recipe]["outcome"] for row in listed))
        for recipe in RECIPES
    }
    every = len(all_cases(TASKS))
    result = {"arguments": vars(args), "classes": every, "counts": counts, "rows": listed}
    write_result(Path(args.output), result)
    if args.page:
        write_text(Path(args.page), format_page(listed, every))


def apart(case: Case, recipe: str, seconds: int, memory_gib: float) -> Trip:
    """A round trip in a forked process, which has everything imported.

    Args:
        case: The class.
        recipe: Of `RECIPES`.
        seconds: Processor time that it may take; by the clock ten times as much.
        memory_gib: Memory that it may take beyond this process's, GiB.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(reading)
            _limit(seconds, memory_gib)
            trip = round_trip(case, recipe)
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(trip, pipe)
        finally:
            os._exit(0)  # not through the parent's exit handlers
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(process, 0)
    if not sent:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        name = signal.Signals(number).name if number else "without a word"
        return Trip(detail=f"the process ended ({name})", step="process")
    found: Trip = pickle.loads(sent)  # from our own process
    return found


def _limit(seconds: int, memory_gib: float) -> None:
    """Ends this process when it takes more; the system does it, whatever code is running."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_WALL * seconds)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space = pages * resource.getpagesize() + int(memory_gib * _GIB)
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
