r"""Fine-tune and compress an encoder on questions in SQuAD's format.

python scripts/run_qa.py --model FOLDER --data_file dev-v1.1.json --questions 2000 \
    --method kfac --param_ratio 0.25 --output_dir outputs/squad

With --train_file the data file is the development set; without it, it is split by article.
"""

from __future__ import annotations

from hf_lowrank.cli.task_command import task_command
from hf_lowrank.tasks.qa import QaArguments, load_qa_task


def main() -> None:
    """Parses, runs, prints, saves."""
    task_command(QaArguments, load_qa_task, __doc__)


if __name__ == "__main__":
    main()
