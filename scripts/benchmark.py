"""Comparisons whose figures stand in README and docs; each writes a JSON with its provenance.

python scripts/benchmark.py metrics --calibration FILE --evaluation FILE --output result.json
python scripts/benchmark.py glue --model FOLDER --data_dir GLUE --tasks mrpc rte --output glue.json
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from transformers import HfArgumentParser

from hf_lowrank.arguments import argument, user_errors
from hf_lowrank.benchmarks.glue import Grid, format_glue_table, read_rows, run_rows
from hf_lowrank.benchmarks.glue_size import smallest_sizes
from hf_lowrank.benchmarks.metrics import compare_metrics, format_metrics
from hf_lowrank.benchmarks.record import write_result
from hf_lowrank.benchmarks.recovery import measure_recovery
from hf_lowrank.data.text import token_batches
from hf_lowrank.recovery import RecoverySettings
from hf_lowrank.sources import load_causal_lm
from hf_lowrank.tasks.arguments import CUT_METRICS, METHOD_NAMES
from hf_lowrank.tasks.glue import GlueArguments


@dataclass
class MetricsArguments:
    """Arguments of the comparison of metrics and rules."""

    model: str = argument("demo", "Dense model, as in compress_llm.py.")
    param_ratio: list[float] | None = argument(None, "Sizes; default 0.9 0.8 0.6 0.4.")
    calibration: str = argument("demo", "Calibration text.")
    calibration_sequences: int = argument(48, "Token windows for calibration.")
    evaluation: str = argument("demo", "Evaluation text.")
    evaluation_sequences: int = argument(32, "Token windows for evaluation.")
    sequence_length: int = argument(256, "Tokens in each window.")
    dtype: str = argument("auto", "Data type of the model.")
    output: str = argument("outputs/metrics.json", "JSON file with the result.")


def compare_all_metrics(args: MetricsArguments) -> None:
    """Every metric with every rule at every size."""
    model, tokenizer = load_causal_lm(args.model, args.dtype)
    texts = [
        token_batches(
            source, tokenizer, sequences=count, sequence_length=args.sequence_length, role=role
        )
        for source, count, role in (
            (args.calibration, args.calibration_sequences, "calibration"),
            (args.evaluation, args.evaluation_sequences, "evaluation"),
        )
    ]
    result = compare_metrics(model, args.param_ratio or [0.9, 0.8, 0.6, 0.4], *texts)
    print(format_metrics(result))
    print(", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items()))
    write_result(Path(args.output), {"arguments": vars(args)} | result)


@dataclass
class RecoveryArguments:
    """Arguments of the measurement of recovery."""

    model: str = argument("demo", "Dense model, as in compress_llm.py.")
    param_ratio: list[float] | None = argument(None, "Sizes; default 0.6 0.4.")
    recover_steps: int = argument(60, "Steps of training the factors.")
    calibration: str = argument("demo", "Text for the moments and the training.")
    calibration_sequences: int = argument(48, "Its token windows.")
    held_out_sequences: int = argument(16, "Windows from its end on which the training is judged.")
    evaluation: list[str] | None = argument(None, "Evaluation texts; default 'demo'.")
    evaluation_sequences: int = argument(32, "Token windows of each.")
    sequence_length: int = argument(256, "Tokens in each window.")
    dtype: str = argument("auto", "Data type of the model.")
    output: str = argument("outputs/recovery.json", "JSON file with the result.")


def measure_recoveries(args: RecoveryArguments) -> None:
    """Perplexity before and after recovery on each evaluation text."""
    model, tokenizer = load_causal_lm(args.model, args.dtype)
    read = partial(token_batches, tokenizer=tokenizer, sequence_length=args.sequence_length)
    calibration = read(args.calibration, sequences=args.calibration_sequences, part=(0.0, 0.75))
    held_out = read(
        args.calibration, sequences=args.held_out_sequences, role="held_out", part=(0.75, 1.0)
    )
    evaluations = {
        Path(source).name: read(source, sequences=args.evaluation_sequences, role="evaluation")
        for source in args.evaluation or ["demo"]
    }
    result = measure_recovery(
        model,
        args.param_ratio or [0.6, 0.4],
        RecoverySettings(args.recover_steps),
        (calibration, held_out),
        evaluations,
    )
    write_result(Path(args.output), {"arguments": vars(args)} | result)


@dataclass
class GlueTableArguments(GlueArguments):
    """Arguments of the GLUE table; those of one run apply to all rows."""

    tasks: list[str] | None = argument(None, "Tasks; default mrpc.")
    methods: list[str] | None = argument(None, "Methods; default all.")
    param_ratios: list[float] | None = argument(None, "Sizes; default 0.25.")
    seeds: list[int] | None = argument(None, "Seeds; default 0.")
    folder: str = argument("outputs/glue", "Folder with a JSON file for each finished row.")
    workers: int = argument(1, "Rows that run side by side.")
    output: str = argument("outputs/glue.json", "JSON file with all finished rows.")


def fill_glue_table(args: GlueTableArguments) -> None:
    """Runs the rows that are missing, then prints all rows of the folder."""
    folder = Path(args.folder)
    grid = Grid(
        args.tasks or ["mrpc"],
        args.methods or METHOD_NAMES,
        args.param_ratios or [0.25],
        args.seeds or [0],
    )
    settings = {field.name: getattr(args, field.name) for field in fields(GlueArguments)}
    run_rows(grid.rows(GlueArguments(**settings)), folder, args.workers)
    rows = read_rows(folder)
    print(format_glue_table(rows))
    write_result(Path(args.output), {"arguments": vars(args), "rows": rows})


@dataclass
class GlueSizeArguments(GlueTableArguments):
    """Arguments of the search for the smallest size; `epochs` 0 judges the cut itself."""

    share: float = argument(0.99, "Share of the dense score to keep on the held-out examples.")


def find_smallest_sizes(args: GlueSizeArguments) -> None:
    """The smallest size of each method on each task."""
    settings = {field.name: getattr(args, field.name) for field in fields(GlueArguments)}
    rows = []
    for task in args.tasks or ["mrpc"]:
        one = GlueArguments(**(settings | {"task": task}))
        methods = args.methods or list(CUT_METRICS)
        rows += smallest_sizes(one, methods, args.share, Path(args.folder))
        write_result(Path(args.output), {"arguments": vars(args), "rows": rows})


COMMANDS = {
    "recovery": (RecoveryArguments, measure_recoveries),
    "metrics": (MetricsArguments, compare_all_metrics),
    "glue": (GlueTableArguments, fill_glue_table),
    "glue-size": (GlueSizeArguments, find_smallest_sizes),
}


def main() -> None:
    """Runs the comparison named by the first argument."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: benchmark.py {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
        raise SystemExit(2)
    arguments, run = COMMANDS[sys.argv[1]]
    (args,) = HfArgumentParser(arguments, description=__doc__).parse_args_into_dataclasses(
        sys.argv[2:]
    )
    with user_errors():
        run(args)


if __name__ == "__main__":
    main()
