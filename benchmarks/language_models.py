"""The comparisons on language models, as scripts/benchmark.py runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.metrics import compare_metrics, format_metrics
from benchmarks.recovery import measure_recovery
from benchmarks.system_rows import read_rows
from benchmarks.system_tables import format_report
from benchmarks.systems import TRIALS, BenchmarkOptions, BenchmarkTexts, compare_systems
from hf_lowrank.compression.recovery import RECOVERIES, RecoverySettings
from hf_lowrank.config import LowRankConfig, config_option, option
from hf_lowrank.inputs.sources import load_causal_lm
from hf_lowrank.inputs.start_token import start_text
from hf_lowrank.inputs.text import token_batches
from hf_lowrank.measuring.items import Batch
from hf_lowrank.report.provenance import write_result


@dataclass
class MetricsArguments:
    """Arguments of the comparison of metrics and rules."""

    model: str = option("demo", "Dense model, as in compress_llm.py.")
    param_ratio: list[float] | None = option(None, "Sizes; default 0.9 0.8 0.6 0.4.")
    calibration: str = option("demo", "Calibration text.")
    calibration_sequences: int = option(48, "Token windows for calibration.")
    evaluation: str = option("demo", "Evaluation text.")
    evaluation_sequences: int = option(32, "Token windows for evaluation.")
    sequence_length: int = option(256, "Tokens in each window.")
    dtype: str = option("auto", "Data type of the model.")
    output: str = option("outputs/metrics.json", "JSON file with the result.")


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
    write_result(
        Path(args.output), {"arguments": vars(args), "start_token": start_text(tokenizer)} | result
    )


@dataclass
class SystemsArguments:
    """Arguments of the comparison of systems."""

    model: str = option("demo", "Dense model, as in compress_llm.py.")
    param_ratio: list[float] | None = option(None, "Sizes; default 0.8 0.6 0.4.")
    systems: list[str] | None = option(None, "Systems; default all.")
    calibration: str = option("demo", "Calibration text; its last quarter is held out.")
    calibration_sequences: int = option(48, "Token windows for calibration.")
    held_out_sequences: int = option(16, "Token windows for searches and acceptance tests.")
    evaluation: str = option("demo", "Evaluation text of the calibration text's kind.")
    out_of_domain: str | None = option(None, "Evaluation text of another kind.")
    evaluation_sequences: int = option(32, "Token windows for each evaluation.")
    sequence_length: int = option(256, "Tokens in each window.")
    trials: int = option(TRIALS, "Plans that a search of ranks may measure on held-out text.")
    seed: int = option(0, "Seed of everything random.")
    dtype: str = option("auto", "Data type of the model.")
    folder: str = option(
        "outputs/systems", "Folder of rows; rows in it are not run again, and all are in the table."
    )


def compare_all_systems(args: SystemsArguments) -> None:
    """Every system at every size, row by row; a killed run goes on where it was."""
    model, tokenizer = load_causal_lm(args.model, args.dtype)

    def read(source: str, role: str, part: tuple[float, float] = (0.0, 1.0)) -> Sequence[Batch]:
        count = getattr(args, f"{role}_sequences")
        length = args.sequence_length
        return token_batches(
            source, tokenizer, sequences=count, sequence_length=length, role=role, part=part
        )

    evaluation = {"in_domain": read(args.evaluation, "evaluation")}
    if args.out_of_domain:
        evaluation["out_of_domain"] = read(args.out_of_domain, "evaluation")
    texts = BenchmarkTexts(
        read(args.calibration, "calibration", (0.0, 0.75)),
        read(args.calibration, "held_out", (0.75, 1.0)),
        evaluation,
    )
    folder = Path(args.folder)
    options = BenchmarkOptions(
        args.param_ratio or [0.8, 0.6, 0.4], args.systems or [], args.trials, args.seed
    )
    same = {k: v for k, v in vars(args).items() if k not in ("param_ratio", "systems", "folder")}
    if start := start_text(tokenizer):
        same["start_token"] = start
    compare_systems(model, texts, options, folder, same)
    print(format_report(read_rows(folder)))


@dataclass
class RecoveryArguments:
    """Arguments of the measurement of recovery."""

    model: str = option("demo", "Dense model, as in compress_llm.py.")
    param_ratio: list[float] | None = option(None, "Sizes; default 0.6 0.4.")
    recover: str = option("factors", "What is trained: " + ", ".join(RECOVERIES) + ".")
    channels: bool = option(False, "Let the cut take channels of feed-forwards out, too.")
    measured_prices: bool = option(False, "Price the cuts on the held-out windows.")
    form: str | None = config_option("form")
    recover_steps: int = option(60, "Steps of training.")
    stages: int = option(1, "Cuts in which each size is reached, as in compress_llm.py.")
    calibration: str = option("demo", "Text for the moments and the training.")
    calibration_sequences: int = option(48, "Its token windows.")
    held_out_sequences: int = option(16, "Windows from its end on which the training is judged.")
    evaluation: list[str] | None = option(None, "Evaluation texts; default 'demo'.")
    evaluation_sequences: int = option(32, "Token windows of each.")
    sequence_length: int = option(256, "Tokens in each window.")
    dtype: str = option("auto", "Data type of the model.")
    output: str = option("outputs/recovery.json", "JSON file with the result.")


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
        RecoverySettings(args.recover_steps, kind=args.recover),
        (calibration, held_out),
        evaluations,
        LowRankConfig(channels=args.channels, measured_prices=args.measured_prices, form=args.form),
        args.stages,
    )
    write_result(
        Path(args.output), {"arguments": vars(args), "start_token": start_text(tokenizer)} | result
    )
