"""Compress a causal language model and save it for `from_pretrained`.

python scripts/compress_llm.py --model gpt2 --param_ratio 0.8 --output_dir gpt2-small
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank import Report, compress, compress_jointly, sweep
from hf_lowrank.arguments import CompressionArguments, parse_arguments, user_errors
from hf_lowrank.compression import check_goal, model_sizes
from hf_lowrank.data.text import check_local_text, token_batches
from hf_lowrank.report.table import format_report, format_sweep
from hf_lowrank.saving import check_cache_folder, check_output_folder, save_compressed
from hf_lowrank.sources import check_windows, load_causal_lm
from hf_lowrank.targets import find_targets


def main() -> None:
    """Parses, loads, compresses, prints, saves."""
    args = parse_arguments(CompressionArguments, __doc__)
    with user_errors():
        run(args)


def run(args: CompressionArguments) -> None:
    """The whole job; see the fields of `CompressionArguments`."""
    config = args.to_config()
    folder = Path(args.output_dir) if args.output_dir else None
    if folder:
        check_output_folder(folder, args.overwrite_output_dir, source=Path(args.model))
    if args.cache_dir:
        check_cache_folder(Path(args.cache_dir))
    for role in args.text_roles():
        check_local_text(args.text_source(role), role)
    model, tokenizer = load_causal_lm(args.model, args.dtype, args.device)
    targets = find_targets(model, config)
    for ratio in args.param_ratio or []:
        check_goal(targets, config.replace(param_ratio=ratio))
    if folder:
        num_bytes = model_sizes(model)[1] * len(args.param_ratio or [1.0])
        check_output_folder(folder, args.overwrite_output_dir, num_bytes)
    texts = read_texts(args, tokenizer)
    for role, batches in texts.items():
        check_windows(model, batches, args.text_source(role))
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
    """Batches by role; held-out text is the end of the calibration text."""
    wanted = args.text_roles()
    parts = {}
    if "held_out" in wanted and args.text_source("calibration") != "demo":
        parts = {"calibration": (0.0, 0.75), "held_out": (0.75, 1.0)}
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
    options = {"cache_dir": args.cache_dir, "recover_steps": args.recover_steps} | texts
    if args.joint:
        sets = [texts.get(role) for role in ("calibration", "held_out", "evaluation")]
        yield compress_jointly(model, config, *sets, cache_dir=args.cache_dir).report
    elif args.param_ratio and len(args.param_ratio) > 1:
        yield from sweep(model, config, args.param_ratio, **options)
    else:
        yield compress(model, config, **options)


if __name__ == "__main__":
    main()
