"""compress_llm.py --stream, block by block: from a checkpoint on disk to another."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from hf_lowrank.cli.arguments import CompressionArguments, PublishingArguments
from hf_lowrank.cli.jobs import check_before_loading, hand_over, used_texts
from hf_lowrank.cli.roles import batches_by_role
from hf_lowrank.compression.streaming.checkpoint import compress_checkpoint
from hf_lowrank.compression.streaming.space import IN_MEMORY
from hf_lowrank.errors import ConfigError
from hf_lowrank.evaluation.size import model_sizes
from hf_lowrank.inputs.on_disk import open_causal_lm
from hf_lowrank.inputs.own_text import GENERATED
from hf_lowrank.inputs.processor import processor_files
from hf_lowrank.inputs.sources import DEMO, check_windows, demo_folder, load_tokenizer
from hf_lowrank.inputs.text import shares
from hf_lowrank.report.schema import Report

_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def streams(args: CompressionArguments) -> bool:
    """Whether to compress block by block: as asked, or where the model would not fit.

    Raises:
        ConfigError: `max_memory` is no size, or there is nothing left for it to decide.
        DataError: The model can't be read.
    """
    limit = None if args.max_memory is None else memory_bytes(args.max_memory)
    if args.stream is not None and limit is not None:
        raise ConfigError("max_memory decides whether to stream; leave it or --stream out.")
    if limit is None:
        return bool(args.stream)
    model, _ = open_causal_lm(args.model, args.dtype, args.trust_remote_code)
    return IN_MEMORY * model_sizes(model)[1] > limit


def memory_bytes(text: str) -> float:
    """The bytes that a size such as "2GB" or "1.5 GB" means.

    Raises:
        ConfigError: It is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"max_memory must be a size such as 2GB or 500MB, got {text!r}.")
    return float(found[1]) * _UNITS[found[2].upper()]


def compress_streamed(args: CompressionArguments, publishing: PublishingArguments) -> None:
    """The whole job, from disk to disk; see the fields of the arguments.

    Raises:
        ConfigError: A setting needs the whole model in memory.
    """
    config = args.to_config()
    needs_memory = {
        "joint": args.joint,
        "recover_steps": args.recover_steps > 0,
        "stages": args.stages > 1,
        "several param_ratios": len(args.param_ratio or []) > 1,
        "sample_prompt": bool(args.sample_prompt) and args.prompts() != [],
        f"the text {GENERATED}": GENERATED in shares(args.text_source("calibration")),
    }
    if asked := [name for name, is_asked in needs_memory.items() if is_asked]:
        raise ConfigError(f"stream has one block in memory at a time; leave out {asked[0]}.")
    if not args.output_dir:
        raise ConfigError("stream goes from disk to disk; give --output_dir.")
    folder = Path(args.output_dir)
    repo_id = check_before_loading(args, publishing, folder)[""]
    source = str(demo_folder()) if args.model == DEMO else args.model
    model, _ = open_causal_lm(source, args.dtype, args.trust_remote_code)
    tokenizer = load_tokenizer(source, args.trust_remote_code)
    texts = batches_by_role(args, model, tokenizer)
    for role, batches in texts.items():
        check_windows(model, batches, args.text_source(role))
    used, processor = used_texts(args, texts, tokenizer), processor_files(args.model)

    def save(model: nn.Module, report: Report) -> None:
        hand_over(
            *(model, tokenizer, report, used, args, publishing, folder, repo_id),
            processor=processor,
        )

    compress_checkpoint(
        source,
        folder,
        config,
        **texts,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        work_dir=args.cache_dir,
        overwrite=args.overwrite_output_dir,
        save=save,
    )
