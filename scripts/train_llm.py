r"""Train a causal language model to lower ranks, chosen by the loss while it trains.

python scripts/train_llm.py --model gpt2 --train my.txt --evaluation other.txt --output_dir out \
    --num_train_epochs 2 --selection_tolerance 0.05

All options of transformers' TrainingArguments apply, except those of its own way to the Hub.
Checkpoints go to OUTPUT_DIR, the result to OUTPUT_DIR/final.
"""

from __future__ import annotations

from pathlib import Path

from hf_lowrank.cli.arguments import PublishingArguments, parse_several, user_errors
from hf_lowrank.cli.jobs import check_publishing, name_models, save_and_publish
from hf_lowrank.cli.training_command import (
    LanguageModelArguments,
    LanguageModelTrainingArguments,
    train_language_model,
)
from hf_lowrank.files import check_output_folder
from hf_lowrank.inputs.processor import processor_files
from hf_lowrank.report.text.table import format_report

ARGUMENTS = (LanguageModelArguments, LanguageModelTrainingArguments, PublishingArguments)


def main() -> None:
    """Parses, trains, prints, saves, publishes."""
    with user_errors():
        args, training, publishing = parse_several(ARGUMENTS, __doc__)
        folder = Path(training.output_dir) / "final"
        check_output_folder(folder, overwrite=False, source=Path(args.model))
        repo_id = check_publishing(publishing, training.output_dir)[""]
        processor = processor_files(args.model)
        model, tokenizer, report = train_language_model(args, training)
        if training.process_index == 0:
            name_models(report, args.model, publishing)
            print(format_report(report))
            save_and_publish(
                model,
                tokenizer,
                report,
                folder,
                repo_id,
                private=publishing.private,
                processor=processor,
            )


if __name__ == "__main__":
    main()
