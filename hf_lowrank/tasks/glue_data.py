"""GLUE tasks from the Hub or from folders in the original formats.

The original files are tab-separated with quotes as plain characters, so they are split on tabs
and newlines only; no CSV reader is involved.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from hf_lowrank.errors import DataError
from hf_lowrank.inputs.hub import prefer_offline_if_unreachable
from hf_lowrank.value_checks import check_choice


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        folder: Name of its folder in the original distribution.
        columns: Names of the first sentence, the second (or None) and the label.
        labels: Class names in the order of their ids; empty for regression.
        positions: Column numbers for files without a header, in the order of `columns`.
        original_columns: Names in the original .tsv files, where they differ.
        hub_columns: Names of the sentences in the Hub's version, where they differ.
    """

    folder: str
    columns: tuple[str, str | None, str]
    labels: tuple[str, ...] = ("0", "1")
    positions: tuple[int, int | None, int] | None = None
    hub_columns: tuple[str, str | None] | None = None
    original_columns: tuple[str, str | None, str] | None = None

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head: 1 for regression."""
        return len(self.labels) or 1


_ENTAILMENT = ("entailment", "not_entailment")
TASKS: dict[str, GlueTask] = {
    "cola": GlueTask("CoLA", ("sentence", None, "label"), positions=(3, None, 1)),
    "sst2": GlueTask("SST-2", ("sentence", None, "label")),
    "mrpc": GlueTask(
        "MRPC", ("#1 String", "#2 String", "Quality"), hub_columns=("sentence1", "sentence2")
    ),
    "stsb": GlueTask("STS-B", ("sentence1", "sentence2", "score"), labels=()),
    "qqp": GlueTask("QQP", ("question1", "question2", "is_duplicate")),
    "mnli": GlueTask(
        "MNLI",
        ("premise", "hypothesis", "label"),
        ("entailment", "neutral", "contradiction"),
        original_columns=("sentence1", "sentence2", "gold_label"),
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence", "label"), _ENTAILMENT),
    "rte": GlueTask("RTE", ("sentence1", "sentence2", "label"), _ENTAILMENT),
    "wnli": GlueTask("WNLI", ("sentence1", "sentence2", "label")),
}
HUB_DATASET = "nyu-mll/glue"
_STEMS = {"train": ("train",), "validation": ("dev", "dev_matched", "validation")}


def load_glue(task: str, split: str, data_dir: str | None = None) -> Dataset:
    """Examples of a task with the columns `sentence1`, `sentence2` (if any) and `label`.

    Args:
        task: A name in `TASKS`.
        split: "train" or "validation".
        data_dir: Folder with the original files, or with the tasks' folders; None for the Hub.

    Raises:
        ConfigError: There is no such task or split.
        DataError: The files are missing, or a column or a label does not fit.
    """
    check_choice("task", task, TASKS)
    check_choice("split", split, _STEMS)
    rows = _hub_rows(task, split) if data_dir is None else _folder_rows(task, split, Path(data_dir))
    if not rows:
        raise DataError(f"{task}: the {split} split is empty.")
    return Dataset.from_list(rows)


def hub_split(task: str, split: str) -> str:
    """What the Hub's version calls the split of `load_glue`."""
    return "validation_matched" if task == "mnli" and split == "validation" else split


def _hub_rows(task: str, split: str) -> list[dict[str, Any]]:
    spec = TASKS[task]
    first, second = spec.hub_columns or spec.columns[:2]
    name = hub_split(task, split)
    prefer_offline_if_unreachable()
    try:
        data = load_dataset(HUB_DATASET, task, split=name)
    except Exception as error:  # the datasets library raises many kinds
        reason = str(error).split("\n", maxsplit=1)[0]
        raise DataError(
            f"GLUE {task}: the Hub can't be reached ({reason}); offline, give --data_dir with the "
            "original files."
        ) from error
    return [_row(row[first], row[second] if second else None, row["label"]) for row in data]


def _folder_rows(task: str, split: str, folder: Path) -> list[dict[str, Any]]:
    path = _find_file(task, split, folder)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # universal newlines would split at a lone \r
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}).") from error
    spec = TASKS[task]
    lines = [(i, line.rstrip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{task}: the {split} split is empty ({path}).")
    if path.suffix == ".jsonl":
        names = [name for name in spec.columns if name]
        cells = [(number, _json_cells(path, number, line, names)) for number, line in lines]
        first, second, label = 0, 1 if spec.columns[1] else None, len(names) - 1
    else:
        cells = [(number, line.split("\t")) for number, line in lines]
        header = [] if spec.positions else cells.pop(0)[1]
        first, second, label = spec.positions or _header_positions(path, header, spec)
    rows = []
    for number, row in cells:
        if len(row) <= max(first, second or 0, label):
            raise DataError(f"{path}: line {number} has {len(row)} columns, which is too few.")
        value = _label(path, number, row[label], spec)
        rows.append(_row(row[first], None if second is None else row[second], value))
    return rows


def _find_file(task: str, split: str, folder: Path) -> Path:
    places = [folder / TASKS[task].folder, folder / task, folder]
    for place in places:
        for stem in _STEMS[split]:
            for suffix in (".tsv", ".jsonl"):
                if (place / f"{stem}{suffix}").is_file():
                    return place / f"{stem}{suffix}"
    raise DataError(
        f"{folder}: has no {split} file of {task}; expected {TASKS[task].folder}/"
        f"{_STEMS[split][0]}.tsv or .jsonl."
    )


def _header_positions(path: Path, header: list[str], spec: GlueTask) -> tuple[int, int | None, int]:
    columns = spec.columns
    if spec.original_columns and spec.original_columns[2] in header:
        columns = spec.original_columns
    missing = [name for name in columns if name and name not in header]
    if missing:
        raise DataError(
            f"{path}: column {missing[0]!r} is missing; the header has {', '.join(header)}."
        )
    first, second, label = (header.index(n) if n else None for n in columns)
    return int(first or 0), second, int(label or 0)


def _json_cells(path: Path, number: int, line: str, names: list[str]) -> list[str]:
    try:
        row = json.loads(line)
        if any(row[name] is None for name in names):
            raise KeyError(next(name for name in names if row[name] is None))
        return [str(row[name]) for name in names]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: line {number} has no usable {error}.") from error


def _label(path: Path, number: int, text: str, spec: GlueTask) -> int | float:
    try:
        if not spec.labels:
            value = float(text)
            if not math.isfinite(value):
                raise ValueError(text)
            return value
        return spec.labels.index(text) if text in spec.labels else _class_id(text, spec)
    except ValueError:
        allowed = ", ".join(spec.labels) or "a number"
        raise DataError(f"{path}: line {number} has label {text!r}; expected {allowed}.") from None


def _class_id(text: str, spec: GlueTask) -> int:
    """A label given as a number; raises ValueError if it is none of the classes."""
    value = int(text)
    if not 0 <= value < len(spec.labels):
        raise ValueError(text)
    return value


def _row(first: str, second: str | None, label: float) -> dict[str, Any]:
    row: dict[str, Any] = {"sentence1": first, "label": label}
    return row if second is None else row | {"sentence2": second}
