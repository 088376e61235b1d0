"""Evaluate a model, dense or compressed: perplexity, tasks, speed, size; beside a baseline.

python scripts/evaluate_model.py --model outputs/demo --baseline demo
python scripts/evaluate_model.py --model FOLDER --glue_task mrpc --data_dir GLUE
"""

from __future__ import annotations

from pathlib import Path

from hf_lowrank.cli.arguments import parse_arguments, user_errors
from hf_lowrank.cli.evaluate import format_evaluation
from hf_lowrank.cli.evaluation_command import EvaluationArguments, evaluate
from hf_lowrank.report.provenance import write_result


def main() -> None:
    """Parses, evaluates, prints, writes."""
    args = parse_arguments(EvaluationArguments, __doc__)
    with user_errors():
        result = evaluate(args)
        print(format_evaluation(result))
        write_result(Path(args.output), {"arguments": vars(args)} | result)


if __name__ == "__main__":
    main()
