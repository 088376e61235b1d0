"""Comparisons whose figures stand in README and docs; each writes a JSON with its provenance.

python scripts/benchmark.py metrics --calibration FILE --evaluation FILE --output result.json
python scripts/benchmark.py glue --model FOLDER --data_dir GLUE --tasks mrpc rte --output glue.json
python scripts/benchmark.py qa --model FOLDER --data_file dev-v1.1.json --questions 2000 \
    --methods dense svd kfac lpaf --param_ratios 0.25 --output qa.json
python scripts/benchmark.py pruned-ranks --model FOLDER --data_dir GLUE --task mrpc \
    --final_density 0.25 --output ranks.json --picture ranks.svg
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import HfArgumentParser

from hf_lowrank.arguments import argument, user_errors
from hf_lowrank.benchmarks.glue import GlueTableArguments, fill_glue_table
from hf_lowrank.benchmarks.glue_size import GlueSizeArguments, find_smallest_sizes
from hf_lowrank.benchmarks.metrics import compare_metrics, format_metrics
from hf_lowrank.benchmarks.pruned_ranks import PrunedRanksArguments, compare_pruned_ranks
from hf_lowrank.benchmarks.qa import QaTableArguments, fill_qa_table
from hf_lowrank.benchmarks.record import write_result
from hf_lowrank.benchmarks.recovery import RecoveryArguments, measure_recoveries
from hf_lowrank.data.text import token_batches
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


COMMANDS = {
    "recovery": (RecoveryArguments, measure_recoveries),
    "metrics": (MetricsArguments, compare_all_metrics),
    "glue": (GlueTableArguments, fill_glue_table),
    "glue-size": (GlueSizeArguments, find_smallest_sizes),
    "qa": (QaTableArguments, fill_qa_table),
    "pruned-ranks": (PrunedRanksArguments, compare_pruned_ranks),
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
