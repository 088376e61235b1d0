"""Text as lines, one sentence each, and pairs of sentences with a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.errors import DataError
from hf_lowrank.inputs.demo_text import BUILT_IN
from hf_lowrank.inputs.text import read_text, windows_of_each

PAIR_COLUMNS = ("sentence1", "sentence2", "score")


def read_sentences(source: str, role: str = "calibration") -> list[str]:
    """The lines of a text that are not empty, each once; of a built-in text its paragraphs.

    Args:
        source: One source of `read_text`.
        role: As there.
    """
    text = read_text(source, role)
    parts = text.split("\n\n") if source in BUILT_IN else text.split("\n")
    return list(dict.fromkeys(line for part in parts if (line := " ".join(part.split()))))


def sentence_batches(
    source: str,
    tokenizer: Any,  # noqa: ANN401
    *,
    sentences: int,
    max_length: int,
    role: str = "calibration",
    part: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 32,
) -> list[dict[str, torch.Tensor]]:
    """Sentences spread evenly over a text, or over several, tokenized and padded.

    Args:
        source: See `read_text`; or a mixture, see `shares`.
        tokenizer: A transformers tokenizer with a padding token.
        sentences: How many; where there are fewer, all.
        max_length: Tokens of each that are read.
        role: What the text is for; decides which part of a built-in text is used.
        part: Share of each text to take from, as (begin, end) in [0, 1]; of built-in texts, which
            are split by role, all is taken.
        batch_size: Sentences in a batch; those of one batch are about equally long.

    Raises:
        DataError: A source is missing, unreadable or empty, or its share is wrong.
    """
    chosen: list[str] = []
    for each, count in windows_of_each(source, sentences).items():
        lines = read_sentences(each, role)
        begin, end = (0.0, 1.0) if each in BUILT_IN else part
        lines = lines[int(begin * len(lines)) : int(end * len(lines))]
        if not lines:
            raise DataError(f"{each}: has too few lines for {role} text; give more.")
        count = min(count, len(lines))
        chosen += [lines[i * len(lines) // count] for i in range(count)]
    return tokenized(chosen, tokenizer, max_length, batch_size)


def tokenized(
    sentences: Sequence[str],
    tokenizer: Any,  # noqa: ANN401
    max_length: int,
    batch_size: int,
    *,
    by_length: bool = True,
) -> list[dict[str, torch.Tensor]]:
    """Padded batches of sentences, the short ones first unless their order is to stay."""
    ordered = sorted(sentences, key=len) if by_length else list(sentences)
    return [
        dict(
            tokenizer(
                ordered[start : start + batch_size],
                truncation=True,
                max_length=max_length,
                padding=True,
                return_tensors="pt",
            )
        )
        for start in range(0, len(ordered), batch_size)
    ]


def read_pairs(
    path: Path, columns: Sequence[str] = PAIR_COLUMNS
) -> tuple[list[str], list[str], list[float]]:
    """Pairs of sentences with their scores, from a file with tabs between its columns.

    Args:
        path: The file; its first line names the columns. Quotes are plain characters.
        columns: Names of the two sentences and of the score.

    Raises:
        DataError: With the line.
    """
    if len(columns) != 3:
        raise DataError(f"sts_columns are two sentences and a score; got {' '.join(columns)}.")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}).") from error
    header = lines[0].rstrip("\r").split("\t")
    missing = [name for name in columns if name not in header]
    if missing:
        raise DataError(
            f"{path}: column {missing[0]!r} is missing; the header has {', '.join(header)}."
        )
    places = [header.index(name) for name in columns]
    first, second, scores = list[str](), list[str](), list[float]()
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) <= max(places):
            raise DataError(f"{path}: line {number} has {len(cells)} columns, which is too few.")
        first.append(cells[places[0]])
        second.append(cells[places[1]])
        scores.append(_score(path, number, cells[places[2]]))
    if len(set(scores)) < 2:
        raise DataError(f"{path}: has no two pairs with different scores; give more pairs.")
    return first, second, scores


def _score(path: Path, number: int, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path}: line {number}: the score {cell!r} is no number; mend it.")
    return value
