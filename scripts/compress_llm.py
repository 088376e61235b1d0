"""Compress a causal language model and save it for `from_pretrained`.

python scripts/compress_llm.py --model gpt2 --param_ratio 0.8 --output_dir gpt2-small
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import HfArgumentParser

from hf_lowrank import Report, compress, sweep
from hf_lowrank.arguments import CompressionArguments, user_errors
from hf_lowrank.compression import model_sizes
from hf_lowrank.data.text import token_batches
from hf_lowrank.report.table import format_report, format_sweep
from hf_lowrank.saving import check_output_folder, save_compressed
from hf_lowrank.sources import load_causal_lm
from hf_lowrank.targets import find_targets


def main() -> None:
    """Parses, loads, compresses, prints, saves."""
    parser = HfArgumentParser(CompressionArguments, description=__doc__)
    (args,) = parser.parse_args_into_dataclasses()
    with user_errors():
        run(args)


def run(args: CompressionArguments) -> None:
    """The whole job; see the fields of `CompressionArguments`."""
    config = args.to_config()
    folder = Path(args.output_dir) if args.output_dir else None
    if folder:
        check_output_folder(folder, args.overwrite_output_dir)
    model, tokenizer = load_causal_lm(args.model, args.dtype, args.device)
    find_targets(model, config)
    if folder:
        ratios = args.param_ratio or [1.0]
        check_output_folder(
            folder, args.overwrite_output_dir, int(model_sizes(model)[1] * sum(ratios))
        )
    texts = read_texts(args, tokenizer)
    reports = []
    for report in compressed(args, model, texts):
        report.model = args.model
        report.data |= {role: args.text_source(role) for role in ("calibration", "evaluation")}
        print(format_report(report), flush=True)
        reports.append(report)
        if folder:
            name = (
                f"{args.param_ratio[len(reports) - 1]}" if len(args.param_ratio or []) > 1 else ""
            )
            save_compressed(
                model, tokenizer, report, folder / name, overwrite=args.overwrite_output_dir
            )
            print(f"saved to {folder / name}\n")
    if len(reports) > 1:
        print(format_sweep(reports))


def read_texts(args: CompressionArguments, tokenizer: Any) -> dict[str, Any]:  # noqa: ANN401
    """Batches by role; a tolerance takes its held-out text from the end of the calibration text."""
    searches = args.param_ratio is None
    same_text = args.text_source("calibration") != "demo"
    wanted = {"calibration": args.calibration_sequences}
    if searches:
        wanted["held_out"] = args.held_out_sequences
    if args.evaluation != "none":
        wanted["evaluation"] = args.evaluation_sequences
    parts = {"calibration": (0.0, 0.75), "held_out": (0.75, 1.0)} if searches and same_text else {}
    return {
        role: token_batches(
            args.text_source(role),
            tokenizer,
            sequences=sequences,
            sequence_length=args.sequence_length,
            role=role,
            part=parts.get(role, (0.0, 1.0)),
            batch_size=args.batch_size,
        )
        for role, sequences in wanted.items()
    }


def compressed(
    args: CompressionArguments, model: nn.Module, texts: dict[str, Any]
) -> Iterator[Report]:
    """One report for each size asked for; the model is compressed while it is handled."""
    config = args.to_config()
    if args.param_ratio and len(args.param_ratio) > 1:
        yield from sweep(model, config, args.param_ratio, cache_dir=args.cache_dir, **texts)
    else:
        yield compress(model, config, cache_dir=args.cache_dir, **texts)


if __name__ == "__main__":
    main()
