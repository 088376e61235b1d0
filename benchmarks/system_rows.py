"""The folder of a comparison's rows: claimed for one setting, filled by several processes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.catalogue import SYSTEMS
from hf_lowrank.errors import ConfigError, StorageError
from hf_lowrank.report.provenance import write_result

SETTINGS = "settings.json"  # marks a folder of such rows


def row_path(folder: Path, name: str, param_ratio: float) -> Path:
    """Where the row of a system and a size is."""
    return folder / f"{name}-{param_ratio:g}.json"


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Notes what a folder's rows depend on, or checks that it is the same.

    Of processes that claim a folder at the same time one writes, and all check what it wrote.

    Raises:
        ConfigError: The folder holds rows of other settings.
    """
    path = folder / SETTINGS
    if not path.exists():
        own = path.with_name(f".{SETTINGS}.claim-{os.getpid()}")
        write_result(own, {"settings": dict(settings)})
        try:
            with contextlib.suppress(FileExistsError):
                os.link(own, path)  # unlike a rename, fails if another process was faster
        except OSError:  # no hard links on this disk
            own.replace(path)
        finally:
            own.unlink(missing_ok=True)
    if json.loads(path.read_text("utf-8"))["settings"] != json.loads(json.dumps(settings)):
        raise ConfigError(
            f"{folder}: holds rows of other settings (see settings.json); name another folder."
        )


def read_row(path: Path) -> dict[str, Any]:
    """A row that was written.

    Raises:
        StorageError: The file is damaged.
    """
    try:
        row: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: can't be read as a row ({error}); delete it.") from error
    return row


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a folder, whoever wrote them, as one claim covers them all.

    Returns:
        Rows in the order of the catalogue, large sizes first; systems that the catalogue does not
        have any more are left out.

    Raises:
        StorageError: A file is damaged.
    """
    order = {system.name: place for place, system in enumerate(SYSTEMS)}
    rows = [read_row(path) for path in folder.glob("*.json") if path.name != SETTINGS]
    rows = [row for row in rows if row.get("name") in order]
    return sorted(rows, key=lambda row: (order[row["name"]], -row["param_ratio"]))


def texts_of(row: Mapping[str, Any]) -> list[str]:
    """Names of the texts on which a row was measured; none of a failed one."""
    return [name for name, value in row.items() if isinstance(value, dict) and "tokens" in value]


def all_texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of all texts of some rows, in order."""
    return list(dict.fromkeys(name for row in rows for name in texts_of(row)))


def dense_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The dense model's size and, by text, its perplexity, loss (nats) and tokens.

    Taken from what the rows say of it. None where no row was measured.
    """
    measured = [row for row in rows if texts_of(row)]
    if not measured:
        return None
    dense: dict[str, Any] = {
        "name": "dense",
        "param_ratio": 1.0,
        "kept_parameters": measured[0]["dense_parameters"],
    }
    for text in all_texts(measured):
        found = next(row[text] for row in measured if text in row)
        dense[text] = {
            "perplexity": found["perplexity_before"],
            "loss": found["loss_before"],
            "tokens": found["tokens"],
        }
    return dense
