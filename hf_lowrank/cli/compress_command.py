"""What scripts/compress_llm.py does: a causal language model in, one or more smaller ones out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank.cli.arguments import CompressionArguments, PublishingArguments
from hf_lowrank.cli.jobs import check_before_loading, check_loaded, hand_over, used_texts
from hf_lowrank.cli.roles import batches_by_role
from hf_lowrank.cli.streamed_command import compress_streamed, streams
from hf_lowrank.compression.joint.system import compress_jointly
from hf_lowrank.compression.verbs import compress, sweep
from hf_lowrank.evaluation.samples import continue_prompts, side_by_side
from hf_lowrank.files import write_text
from hf_lowrank.inputs.processor import processor_files
from hf_lowrank.inputs.sources import check_windows, load_causal_lm
from hf_lowrank.measuring.distributed import current_processes
from hf_lowrank.measuring.progress import announce
from hf_lowrank.report.page.page import comparison_page
from hf_lowrank.report.page.plots import can_draw
from hf_lowrank.report.schema import Report
from hf_lowrank.report.text.table import format_sweep


def compress_causal_lm(args: CompressionArguments, publishing: PublishingArguments) -> None:
    """The whole job, in memory or block by block; see the fields of the arguments.

    Raises:
        LowRankError: Before any long work, where something does not fit.
    """
    (compress_streamed if streams(args) else _compress_in_memory)(args, publishing)


def _compress_in_memory(args: CompressionArguments, publishing: PublishingArguments) -> None:
    config, folder = args.to_config(), Path(args.output_dir) if args.output_dir else None
    repositories = check_before_loading(args, publishing, folder)
    announce(f"load {args.model}")
    model, tokenizer = load_causal_lm(args.model, args.dtype, args.device, args.trust_remote_code)
    processor = processor_files(args.model)
    check_loaded(model, config, args, folder)
    texts = batches_by_role(args, model, tokenizer)
    for role, batches in texts.items():
        check_windows(model, batches, args.text_source(role))
    used = used_texts(args, texts, tokenizer)
    prompts = args.prompts() if folder else []
    dense = continue_prompts(model, tokenizer, prompts)
    reports: dict[str, Report] = {}
    found = _compressed(args, model, texts)
    for (name, repo_id), report in zip(repositories.items(), found, strict=True):
        if not current_processes().is_main:  # of all that compress, one prints and saves
            continue
        report.samples = side_by_side(prompts, dense, continue_prompts(model, tokenizer, prompts))
        place = folder / name if folder else None
        hand_over(
            *(model, tokenizer, report, used, args, publishing, place, repo_id), processor=processor
        )
        reports[name] = report
    if len(reports) > 1:
        _compare(reports, folder if args.html_report else None)


def _compressed(
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


def _compare(reports: dict[str, Report], folder: Path | None) -> None:
    if folder and can_draw():
        write_text(folder / "compare.html", comparison_page(reports))
        print(f"side by side: {folder / 'compare.html'}\n")
    print(format_sweep(list(reports.values())))
