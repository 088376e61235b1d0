"""Comparisons whose figures stand in README and docs; each writes a JSON with its provenance.

python scripts/benchmark.py metrics --calibration FILE --evaluation FILE --output result.json
python scripts/benchmark.py systems --calibration FILE --evaluation FILE --output_dir rows
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import HfArgumentParser

from hf_lowrank.arguments import argument, user_errors
from hf_lowrank.benchmarks.metrics import compare_metrics, format_metrics
from hf_lowrank.benchmarks.record import write_result
from hf_lowrank.benchmarks.systems import (
    BenchmarkOptions,
    BenchmarkTexts,
    compare_systems,
    format_systems,
)
from hf_lowrank.data.text import token_batches
from hf_lowrank.losses import Batch
from hf_lowrank.sources import load_causal_lm


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


COMMANDS = {
    "metrics": (MetricsArguments, compare_all_metrics),
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
