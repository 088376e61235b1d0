"""One run on a task, printed, saved and published: what the scripts of tasks do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hf_lowrank.cli.arguments import PublishingArguments, parse_several, user_errors
from hf_lowrank.cli.jobs import check_publishing, name_models, save_and_publish
from hf_lowrank.files import check_cache_folder, check_output_folder
from hf_lowrank.report.text.table import align
from hf_lowrank.tasks.task import Task
from hf_lowrank.tasks.task_arguments import TaskArguments
from hf_lowrank.tasks.task_card import format_loss
from hf_lowrank.tasks.task_report import TaskReport
from hf_lowrank.tasks.task_run import run_task

Arguments = TypeVar("Arguments", bound=TaskArguments)


def task_command(
    arguments: type[Arguments], load_task: Callable[[Arguments], Task], description: str | None
) -> None:
    """Parses the command line, runs, prints, saves the model with report and card, publishes it.

    A mistake of the user ends with one line on stderr and exit code 2.

    Args:
        arguments: Dataclass of the task's arguments.
        load_task: Makes the task of them.
        description: For `--help`.
    """
    args, publishing = parse_several((arguments, PublishingArguments), description)
    with user_errors():
        args.check()
        args.check_readers()
        folder = Path(args.output_dir) if args.output_dir else None
        if folder:
            check_output_folder(folder, overwrite=False, cache=Path(args.cache_dir))
        check_cache_folder(Path(args.cache_dir))
        repo_id = check_publishing(publishing, args.output_dir)[""]
        task = load_task(args)
        model, report = run_task(task, args)
        name_models(report, args.model, publishing)
        print(format_scores(report))
        if folder:
            save_and_publish(
                model,
                task.tokenizer,
                report,
                folder,
                repo_id,
                private=publishing.private,
                page=False,
            )


def format_scores(report: TaskReport) -> str:
    """The run's figures as a table."""
    rows = [["", *report.dense_metrics]]
    for name in ("dense_metrics", "pruned_metrics", "uncured_metrics", "metrics"):
        if (found := getattr(report, name)) is not None:
            rows.append([name, *(f"{value:.4f}" for value in found.values())])
    loss = format_loss(report.development_loss) if report.development_loss else None
    kept = report.parameters
    last = f"kept {kept.targeted_kept:,} targeted parameters ({kept.targeted_share:.2%})"
    return "\n".join(line for line in (align(rows), loss, last, report.refusal) if line)
