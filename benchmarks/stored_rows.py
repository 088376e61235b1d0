"""Tables and pictures of rows that lie in a folder, without measuring anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.perturbation_figure import draw_ranges
from benchmarks.system_figure import draw_systems
from benchmarks.system_rows import SETTINGS, read_rows
from benchmarks.system_tables import format_report
from hf_lowrank.config import option
from hf_lowrank.errors import ConfigError


@dataclass
class ShowArguments:
    """Arguments of the view of stored rows."""

    rows: str = option(
        "outputs/systems", "Folder of rows of `systems`, or the JSON file of `perturbation`."
    )
    picture: str | None = option(None, "SVG file for their picture.")


def show_rows(args: ShowArguments) -> None:
    """Prints the tables of a comparison of systems; draws its rows, or those of a perturbation.

    Raises:
        ConfigError: There are no such rows, or matplotlib is missing.
        StorageError: A row's file is damaged.
    """
    source = Path(args.rows)
    if (source / SETTINGS).is_file():
        rows, draw = read_rows(source), draw_systems
        print(format_report(rows))
    elif source.is_file() and "ranges" in (found := json.loads(source.read_text("utf-8"))):
        rows, draw = found["ranges"], draw_ranges
    else:
        raise ConfigError(
            f"{source}: holds no rows of systems (a folder with {SETTINGS}) or of perturbation "
            "(a JSON file); run `benchmark.py systems` or `benchmark.py perturbation`."
        )
    if args.picture:
        draw(rows, Path(args.picture))
