r"""Fine-tune and compress an encoder that finds named spans, on files with a word and a tag a line.

python scripts/run_ner.py --model FOLDER --train_file train.txt --data_file dev.txt \
    --method kfac --param_ratio 0.25 --output_dir outputs/ner
"""

from __future__ import annotations

from hf_lowrank.cli.task_command import task_command
from hf_lowrank.tasks.ner import NerArguments, load_ner_task


def main() -> None:
    """Parses, runs, prints, saves."""
    task_command(NerArguments, load_ner_task, __doc__)


if __name__ == "__main__":
    main()
