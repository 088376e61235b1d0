"""Steps of scripts/compress_llm.py: what to check first, and which verb the arguments ask for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank.arguments import CompressionArguments
from hf_lowrank.compression import compress, sweep
from hf_lowrank.data.text import check_local_text
from hf_lowrank.joint.system import compress_jointly
from hf_lowrank.publishing import check_repository
from hf_lowrank.report.plots import can_draw
from hf_lowrank.report.schema import Report
from hf_lowrank.saving import check_cache_folder, check_output_folder


def check_before_loading(args: CompressionArguments, folder: Path | None) -> dict[str, str | None]:
    """All that can be known at once; the repository of each size by its folder's name."""
    if folder:
        check_output_folder(folder, args.overwrite_output_dir, source=Path(args.model))
    if args.cache_dir:
        check_cache_folder(Path(args.cache_dir))
    for role in args.text_roles():
        check_local_text(args.text_source(role), role)
    if folder and args.html_report and not can_draw():
        print(
            "report.html is left out: it needs matplotlib (pip install 'hf-lowrank[plots]')",
            file=sys.stderr,
        )
    return {
        name: check_repository(repo_id, args.private) if repo_id else None
        for name, repo_id in args.sizes().items()
    }


def compressed(
    args: CompressionArguments, model: nn.Module, texts: dict[str, Any]
) -> Iterator[Report]:
    """One report for each size asked for; the model is compressed while it is handled."""
    config = args.to_config()
    options = {name: getattr(args, name) for name in ("cache_dir", "recover_steps", "recover")}
    options |= texts
    if args.joint:
        gradient, acceptance = texts["calibration"], texts["held_out"]
        yield compress_jointly(
            model,
            config,
            gradient,
            acceptance,
            texts.get("evaluation"),
            cache_dir=args.cache_dir,
        ).report
    elif args.param_ratio and len(args.param_ratio) > 1:
        yield from sweep(model, config, args.param_ratio, **options)
    else:
        yield compress(model, config, **options)
