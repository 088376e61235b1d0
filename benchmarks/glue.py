"""The table of GLUE tasks."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.table import TableArguments, fill_table, part_of
from hf_lowrank.config import config_option, option
from hf_lowrank.tasks.glue import GlueArguments, load_glue_task


@dataclass
class GlueTableArguments(GlueArguments, TableArguments):
    """Arguments of the GLUE table; those of one run apply to all rows."""

    tasks: list[str] | None = option(None, "Tasks; default mrpc.")
    form: str | None = config_option("form", default="factors")  # as papers store them
    folder: str = option("outputs/glue", "Folder of rows, a JSON file for each finished one.")


def fill_glue_table(args: GlueTableArguments) -> None:
    """Runs the rows that are missing, then prints all rows of the folder."""
    fill_table(args, args.tasks or ["mrpc"], part_of(args, GlueArguments), load_glue_task)
