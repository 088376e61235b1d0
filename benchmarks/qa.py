"""The table of question answering."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.table import TableArguments, fill_table, part_of
from hf_lowrank.config import config_option, option
from hf_lowrank.tasks.qa import QaArguments, load_qa_task


@dataclass
class QaTableArguments(QaArguments, TableArguments):
    """Arguments of the table of question answering; those of one run apply to all rows."""

    form: str | None = config_option("form", default="factors")  # as papers store them
    folder: str = option("outputs/qa", "Folder of rows, a JSON file for each finished one.")


def fill_qa_table(args: QaTableArguments) -> None:
    """Runs the rows that are missing, then prints all rows of the folder."""
    fill_table(args, [args.task], part_of(args, QaArguments), load_qa_task)
