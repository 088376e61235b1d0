"""Comparisons whose figures stand in README and docs; each writes a JSON with its provenance.

python scripts/benchmark.py metrics --calibration FILE --evaluation FILE --output result.json
python scripts/benchmark.py systems --calibration FILE --evaluation FILE --output_dir rows
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
from hf_lowrank.benchmarks.systems import (
    BenchmarkOptions,
    BenchmarkTexts,
    compare_systems,
    format_systems,
)
from hf_lowrank.data.text import token_batches
from hf_lowrank.losses import Batch
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
class SystemsArguments:
    """Arguments of the comparison of systems."""

    model: str = argument("demo", "Dense model, as in compress_llm.py.")
    param_ratio: list[float] | None = argument(None, "Sizes; default 0.8 0.6 0.4.")
    systems: list[str] | None = argument(None, "Systems; default all.")
    calibration: str = argument("demo", "Calibration text; its last quarter is held out.")
    calibration_sequences: int = argument(48, "Token windows for calibration.")
    held_out_sequences: int = argument(16, "Token windows for searches and acceptance tests.")
    evaluation: str = argument("demo", "Evaluation text of the calibration text's kind.")
    out_of_domain: str | None = argument(None, "Evaluation text of another kind.")
    evaluation_sequences: int = argument(32, "Token windows for each evaluation.")
    sequence_length: int = argument(256, "Tokens in each window.")
    trials: int = argument(24, "Plans that a search of ranks may measure.")
    seed: int = argument(0, "Seed of everything random.")
    dtype: str = argument("auto", "Data type of the model.")
    output_dir: str = argument("outputs/systems", "Folder of rows; rows in it are not run again.")


def compare_all_systems(args: SystemsArguments) -> None:
    """Every system at every size, row by row; a killed run goes on where it was."""
    model, tokenizer = load_causal_lm(args.model, args.dtype)
    splits = args.calibration != "demo"  # the demo text has a part of its own for each role

    def read(source: str, role: str, part: tuple[float, float] = (0.0, 1.0)) -> list[Batch]:
        count = getattr(args, f"{role}_sequences")
        length = args.sequence_length
        kind = {"sequences": count, "sequence_length": length, "role": role, "part": part}
        return token_batches(source, tokenizer, **kind)

    evaluation = {"in_domain": read(args.evaluation, "evaluation")}
    if args.out_of_domain:
        evaluation["out_of_domain"] = read(args.out_of_domain, "evaluation")
    texts = BenchmarkTexts(
        read(args.calibration, "calibration", (0.0, 0.75) if splits else (0.0, 1.0)),
        read(args.calibration, "held_out", (0.75, 1.0) if splits else (0.0, 1.0)),
        evaluation,
    )
    folder = Path(args.output_dir)
    options = BenchmarkOptions(
        args.param_ratio or [0.8, 0.6, 0.4], args.systems or [], args.trials, args.seed
    )
    same = {
        k: v for k, v in vars(args).items() if k not in ("param_ratio", "systems", "output_dir")
    }
    rows = compare_systems(model, texts, options, folder / "rows", same)
    print(format_systems(rows))
    write_result(folder / "systems.json", {"arguments": vars(args), "rows": rows})
    (folder / "systems.md").write_text(format_systems(rows) + "\n", encoding="utf-8")


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
    "systems": (SystemsArguments, compare_all_systems),
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
