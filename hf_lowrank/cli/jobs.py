"""Steps that scripts share: what to check first, what a report says, saving, publishing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank.cli.arguments import READ_AS, PublishingArguments
from hf_lowrank.cli.job_arguments import JobArguments
from hf_lowrank.cli.publishing import check_repository, publish
from hf_lowrank.cli.saving import save_compressed
from hf_lowrank.compression.byte_budget import check_size_goal
from hf_lowrank.compression.goals import check_goal
from hf_lowrank.config import LowRankConfig
from hf_lowrank.evaluation.size import model_sizes
from hf_lowrank.files import check_cache_folder, check_output_folder
from hf_lowrank.inputs.demo_text import BUILT_IN, DEMO
from hf_lowrank.inputs.own_text import GENERATED
from hf_lowrank.inputs.sources import check_hub_id, hub_id
from hf_lowrank.inputs.start_token import start_text
from hf_lowrank.inputs.text import check_local_text, shares
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.report.page.plots import can_draw
from hf_lowrank.report.provenance import command_line
from hf_lowrank.report.schema import Report
from hf_lowrank.report.text.table import format_report


def check_before_loading(
    args: JobArguments, publishing: PublishingArguments, folder: Path | None
) -> dict[str, str | None]:
    """Runs the checks that need no model; returns each size's repository by folder name."""
    if folder:
        texts = {each for role in args.text_roles() for each in shares(args.text_source(role))}
        check_output_folder(
            folder,
            args.overwrite_output_dir,
            source=None if args.model == DEMO else Path(args.model),
            texts=[Path(text) for text in sorted(texts - {*BUILT_IN, GENERATED})],
            cache=Path(args.cache_dir) if args.cache_dir else None,
        )
    if args.cache_dir:
        check_cache_folder(Path(args.cache_dir))
    for role in args.text_roles():
        check_local_text(args.text_source(role), READ_AS.get(role, role))
    if folder and args.html_report and not can_draw():
        print(
            "report.html is left out: it needs matplotlib (pip install 'hf-lowrank[plots]')",
            file=sys.stderr,
        )
    return check_publishing(publishing, args.output_dir, args.sizes())


def check_loaded(
    model: nn.Module, config: LowRankConfig, args: JobArguments, folder: Path | None
) -> None:
    """Runs the checks of goals and space that need the dense model.

    Raises:
        ConfigError: A size can't be reached.
        StorageError: The results don't fit on the disk.
    """
    targets = find_targets(model, config)
    for ratio in args.param_ratio or []:
        check_goal(targets, config.replace(param_ratio=ratio))
    check_size_goal(model, targets, config)
    if folder:
        num_bytes = model_sizes(model)[1] * len(args.sizes())
        check_output_folder(folder, args.overwrite_output_dir, num_bytes)


def check_publishing(
    publishing: PublishingArguments, output_dir: str | None, sizes: Sequence[str] = ("",)
) -> dict[str, str | None]:
    """The full name of each size's repository, or None; asks the Hub, changes nothing there.

    Raises:
        ConfigError: A setting would not be read, or is no name of a model on the Hub.
        PublishError: A repository can't be published to.
    """
    publishing.check(output_dir)
    if publishing.base_model:
        check_hub_id(publishing.base_model)
    wanted = {size: publishing.repository(size) for size in sizes}
    return {
        size: check_repository(repo_id, publishing.private) if repo_id else None
        for size, repo_id in wanted.items()
    }


def name_models(report: Report, model: str, publishing: PublishingArguments) -> None:
    """Puts the dense model's name, its Hub id if there is one, and the command into a report."""
    report.model, report.base_model = model, publishing.base_model or hub_id(model)
    report.command = command_line()


def used_texts(
    args: JobArguments,
    roles: Iterable[str],
    tokenizer: Any = None,  # noqa: ANN401
) -> dict[str, Any]:
    """What a report says of its texts: their sources by role; how windows start, if a token does.

    Args:
        args: The arguments that name the sources.
        roles: The texts in use; the held-out one is part of the calibration text.
        tokenizer: Of texts that are cut into windows.
    """
    used = {role: args.text_source(role) for role in roles if role != "held_out"}
    start = start_text(tokenizer) if tokenizer else None
    return used | ({"start_token": start} if start else {})


def hand_over(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    report: Report,
    used: Mapping[str, Any],
    args: JobArguments,
    publishing: PublishingArguments,
    folder: Path | None,
    repo_id: str | None,
    **options: Any,
) -> None:
    """Completes and prints the report of a compressed model; saves and publishes both if asked to.

    Args:
        model: The compressed model.
        tokenizer: Its tokenizer.
        report: What was done and measured.
        used: From `used_texts`.
        args: The arguments of the run.
        publishing: Likewise.
        folder: Where to save, or None.
        repo_id: As in `save_and_publish`.
        **options: `processor` and `finish` of `save_and_publish`.

    Raises:
        StorageError, PublishError: As in `save_and_publish`.
    """
    name_models(report, args.model, publishing)
    report.data = replace(report.data, **used)
    print(format_report(report), flush=True)
    if folder:
        options |= {"overwrite": args.overwrite_output_dir, "page": args.html_report}
        private = publishing.private
        save_and_publish(model, tokenizer, report, folder, repo_id, private=private, **options)


def save_and_publish(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    report: Report,
    folder: Path,
    repo_id: str | None = None,
    *,
    private: bool = False,
    processor: Mapping[str, bytes] | None = None,
    finish: Callable[[Path], None] | None = None,
    **options: bool,
) -> None:
    """Saves a model with report and card, publishes it if asked to, and says where it is.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        report: What was done and measured.
        folder: Where to.
        repo_id: Repository on the Hub, from `check_publishing`, or None.
        private: Whether it is to be private.
        processor: As in `save_compressed`.
        finish: Likewise.
        **options: `overwrite` and `page` of `save_compressed`.

    Raises:
        StorageError: Nothing is saved.
        PublishError: It is saved, and nothing is published.
    """
    save_compressed(
        model,
        tokenizer,
        report,
        folder,
        repo_id=repo_id,
        processor=processor,
        finish=finish,
        **options,
    )
    print(f"saved to {folder}\n", flush=True)
    if repo_id:
        print(f"published as {publish(folder, repo_id, private)}\n", flush=True)
