"""One run on a task, printed and saved: what run_glue.py and run_qa.py do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hf_lowrank.arguments import parse_arguments, user_errors
from hf_lowrank.benchmarks.record import provenance
from hf_lowrank.report.schema import jsonable
from hf_lowrank.report.table import align
from hf_lowrank.saving import atomic_folder, check_output_folder
from hf_lowrank.tasks.arguments import TaskArguments
from hf_lowrank.tasks.run import run_task
from hf_lowrank.tasks.task import Task

Arguments = TypeVar("Arguments", bound=TaskArguments)


def task_command(
    arguments: type[Arguments], load_task: Callable[[Arguments], Task], description: str | None
) -> None:
    """Parses the command line, runs, prints, and saves the model with its report.

    A mistake of the user ends with one line on stderr and exit code 2.

    Args:
        arguments: Dataclass of the task's arguments.
        load_task: Makes the task of them.
        description: For `--help`.
    """
    args = parse_arguments(arguments, description)
    with user_errors():
        args.check()
        folder = Path(args.output_dir) if args.output_dir else None
        if folder:
            check_output_folder(folder, overwrite=False)
        task = load_task(args)
        model, report = run_task(task, args)
        print(format_scores(report))
        if folder:
            with atomic_folder(folder) as temporary:
                model.save_pretrained(temporary)  # type: ignore[operator]
                task.tokenizer.save_pretrained(temporary)
                text = json.dumps(jsonable(provenance() | report), indent=2)
                (temporary / "report.json").write_text(text + "\n", encoding="utf-8")
            print(f"saved to {folder}")


def format_scores(report: dict[str, Any]) -> str:
    """The run's figures as a table."""
    parameters = report["parameters"]
    rows = [["", *report["dense_metrics"]]]
    for name in ("dense_metrics", "uncured_metrics", "metrics"):
        if name in report:
            rows.append([name, *(f"{value:.4f}" for value in report[name].values())])
    kept = parameters["targeted_kept"] / parameters["targeted_dense"]
    return f"{align(rows)}\nkept {parameters['targeted_kept']:,} targeted parameters ({kept:.2%})"
