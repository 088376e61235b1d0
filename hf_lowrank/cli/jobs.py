"""Steps that scripts share: what to check first, which verb is asked for, saving, publishing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank.cli.arguments import READ_AS, CompressionArguments, PublishingArguments
from hf_lowrank.cli.job_arguments import JobArguments
from hf_lowrank.cli.publishing import check_repository, publish
from hf_lowrank.cli.saving import save_compressed
from hf_lowrank.compression.joint.system import compress_jointly
from hf_lowrank.compression.verbs import compress, sweep
from hf_lowrank.files import check_cache_folder, check_output_folder
from hf_lowrank.inputs.demo_text import BUILT_IN, DEMO
from hf_lowrank.inputs.own_text import GENERATED
from hf_lowrank.inputs.sources import check_hub_id, hub_id
from hf_lowrank.inputs.text import check_local_text, shares
from hf_lowrank.report.page.plots import can_draw
from hf_lowrank.report.provenance import command_line
from hf_lowrank.report.schema import Report


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


def compressed(
    args: CompressionArguments, model: nn.Module, texts: dict[str, Any]
) -> Iterator[Report]:
    """One report for each size asked for; the model is compressed while it is handled."""
    config = args.to_config()
    names = ("cache_dir", "recover_steps", "recover", "speed")
    options = {name: getattr(args, name) for name in names} | texts
    if args.joint:
        gradient, acceptance = texts["calibration"], texts["held_out"]
        yield compress_jointly(
            model,
            config,
            gradient,
            acceptance,
            texts.get("evaluation"),
            foreign=texts.get("foreign"),
            cache_dir=args.cache_dir,
            speed=args.speed,
        )
    elif args.param_ratio and len(args.param_ratio) > 1:
        yield from sweep(model, config, args.param_ratio, **options)
    else:
        yield compress(model, config, stages=args.stages, **options)
