"""The page of the sweep over the classes of transformers."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.round_trip import LOADED, MERGED, RECIPES

_TITLES = {
    "refused": "Refused before any work",
    "differs": "Differences",
    "failed": "Failures",
    "transformers": "The dense model does not come back either",
    "untried": "Can't be tried",
}
_HEAD = """# Which architectures were tried

One class of each model type in transformers' mappings of tasks, with two layers and random
weights: compressed to half, saved, loaded strictly and by its auto class, asked for three tokens
where it writes, and merged. *Default* is the default recipe on random tokens, *plain* the plain
metric without data. *Same*: the loaded models' logits differ from those of the compressed model in
memory by {loaded:g} of the largest logit at most, the merged model's by {merged:g}.

`python scripts/benchmark.py architectures --output docs/results/architectures.json --page
docs/architectures.md` goes on where the file ends and writes this page
([rows](results/architectures.json), each with its differences).

{number} of {every} classes are counted here.

"""


def format_page(rows: Sequence[Mapping[str, Any]], every: int) -> str:
    """The page in Markdown: counts by task, then every sentence with the classes that got it.

    Args:
        rows: Rows of the sweep.
        every: How many classes there are.
    """
    head = _HEAD.format(loaded=LOADED, merged=MERGED, number=len(rows), every=every)
    parts = [head + _counts(rows)]
    parts += [_sentences(rows, outcome, title) for outcome, title in _TITLES.items()]
    return "\n".join([*filter(None, parts), _same(rows)])


def _counts(rows: Sequence[Mapping[str, Any]]) -> str:
    kinds = ("ok", *_TITLES)
    lines = [
        "| task | recipe | same | bit for bit | refused | differs | failed "
        "| dense fails, too | can't be tried |",
        "| --- | --- |" + " ---: |" * 7,
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        for recipe in RECIPES:
            trips = [row[recipe] for row in rows if row["task"] == task]
            count = collections.Counter(trip["outcome"] for trip in trips)
            exact = sum(_is_exact(trip) for trip in trips)
            cells = [count["ok"], exact, *(count[kind] for kind in kinds[1:])]
            lines.append(f"| {_said(task)} | {recipe} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _is_exact(trip: Mapping[str, Any]) -> bool:
    loaded = [trip["differences"].get(step) for step in ("load", "auto")]
    return trip["outcome"] == "ok" and loaded == [0.0, 0.0]


def _said(task: str) -> str:
    return task.lower().replace("_", " ")


def _sentences(rows: Sequence[Mapping[str, Any]], outcome: str, title: str) -> str:
    """Each sentence once; names and numbers in it are those of the first class."""
    classes: dict[str, list[str]] = collections.defaultdict(list)
    first: dict[str, str] = {}
    for row in rows:
        for recipe in RECIPES:
            trip = row[recipe]
            if trip["outcome"] != outcome:
                continue
            sentence = f"{recipe}, {trip['step']}: {trip['detail']}"
            key = re.sub(r"\d[\d.,e-]*|" + re.escape(row["model_class"]), "#", sentence)
            first.setdefault(key, sentence)
            classes[key].append(row["model_class"])
    if not classes:
        return ""
    lines = [f"- {_escaped(first[key])}\n  {', '.join(names)}" for key, names in classes.items()]
    return f"## {title}\n\n" + "\n".join(lines) + "\n"


def _escaped(sentence: str) -> str:
    return re.sub(r"([*_<>|`\[\]])", r"\\\1", sentence)


def _same(rows: Sequence[Mapping[str, Any]]) -> str:
    """The classes that came through with both recipes, by task."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        names = [
            row["model_class"]
            for row in rows
            if row["task"] == task and all(row[recipe]["outcome"] == "ok" for recipe in RECIPES)
        ]
        lines.append(f"- {_said(task)}: {', '.join(names)}")
    return "## Same with both\n\n" + "\n".join(lines) + "\n"
