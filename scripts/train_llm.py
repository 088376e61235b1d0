"""Train a causal language model to lower ranks, chosen by the loss while it trains.

python scripts/train_llm.py --model gpt2 --train my.txt --evaluation other.txt --output_dir out \
    --num_train_epochs 2 --selection_tolerance 0.05

All options of transformers' TrainingArguments apply. Checkpoints go to OUTPUT_DIR, the result to
OUTPUT_DIR/final.
"""

from __future__ import annotations

from pathlib import Path

from transformers import HfArgumentParser

from hf_lowrank.arguments import user_errors
from hf_lowrank.report.table import format_report
from hf_lowrank.saving import check_output_folder, save_compressed
from hf_lowrank.training.arguments import LowRankTrainingArguments
from hf_lowrank.training.language_model import LanguageModelArguments, train_language_model


def main() -> None:
    """Parses, trains, prints, saves."""
    parser = HfArgumentParser(
        (LanguageModelArguments, LowRankTrainingArguments), description=__doc__
    )
    with user_errors():
        args, training = parser.parse_args_into_dataclasses()
        folder = Path(training.output_dir) / "final"
        check_output_folder(folder, overwrite=False, source=Path(args.model))
        model, tokenizer, report = train_language_model(args, training)
        if training.process_index == 0:
            print(format_report(report))
            save_compressed(model, tokenizer, report, folder)
            print(f"saved to {folder}")


if __name__ == "__main__":
    main()
