"""Extractive question answering from files in SQuAD's JSON format (version 1.1).

`{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers":
[{"text", "answer_start"}]}]}]}]}`; `answer_start` counts characters.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_lowrank.errors import DataError
from hf_lowrank.value_checks import check_between


def load_squad(path: str | Path) -> Dataset:
    """The questions of a file, in its order.

    Returns:
        The columns `id`, `title` (of the article), `context`, `question` and `answers`, which holds
        the lists `text` and `answer_start`: at least one answer for each question.

    Raises:
        DataError: The file can't be read or is of another format, an answer does not stand where
            the file says, or questions have no answer, as in SQuAD 2.0: scores on the others alone
            would not be that data set's.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: can't be read as JSON ({error}).") from error
    rows = list(_rows(path, content))
    if not rows:
        raise DataError(f"{path}: holds no questions; give another file.")
    unanswerable = sum(not row["answers"]["text"] for row in rows)
    if unanswerable:
        raise DataError(
            f"{path}: {unanswerable} of {len(rows)} questions have no answer, as in SQuAD 2.0; "
            "a file of version 1.1 is needed."
        )
    for row in rows:
        _check_answers(path, row)
    return Dataset.from_list(rows)


def split_by_article(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Two parts that have no article in common, each in the order of the data.

    Articles are shuffled and go to the first part as long as that brings its questions nearer to
    the share; each part gets at least one article.

    Args:
        data: From `load_squad`.
        share: Share of the questions for the first part, in (0, 1).
        seed: Seed of the order of the articles.

    Raises:
        ConfigError: The share is out of range.
        DataError: There is only one article.
    """
    check_between("share", share, "(0, 1)")
    counts = Counter(data["title"])
    if len(counts) < 2:
        raise DataError(
            f"{len(counts)} article can't be split by article; give more articles, or a file of "
            "its own for each part."
        )
    titles = sorted(counts)
    random.Random(seed).shuffle(titles)
    wanted, first, size = share * len(data), {titles[0]}, counts[titles[0]]
    for title in titles[1:-1]:
        if abs(size + counts[title] - wanted) < abs(size - wanted):
            first.add(title)
            size += counts[title]
    of_first = [title in first for title in data["title"]]
    parts = ([i for i, is_in in enumerate(of_first) if is_in is side] for side in (True, False))
    one, other = (data.select(rows) for rows in parts)
    return one, other


def take_questions(parts: list[Dataset], count: int, seed: int) -> list[Dataset]:
    """A seeded subset of all parts together, from each in proportion and in its order; 0 for all.

    Raises:
        DataError: So few questions that a part gets none.
    """
    total = sum(len(part) for part in parts)
    if count <= 0 or count >= total:
        return parts
    sizes = [round(count * len(part) / total) for part in parts]
    if not all(sizes):
        raise DataError(f"{count} questions leave a part of the data empty; take more.")
    return [
        part.select(sorted(random.Random(seed).sample(range(len(part)), size)))
        for part, size in zip(parts, sizes, strict=True)
    ]


def _rows(path: Path, content: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401
    place = "the file"
    try:
        for number, article in enumerate(content["data"], 1):
            place = f"article {number}"
            title = str(article.get("title") or place)
            for paragraph in article["paragraphs"]:
                context = _text(paragraph, "context")
                for question in paragraph["qas"]:
                    answers = question["answers"]
                    yield {
                        "id": str(question["id"]),
                        "title": title,
                        "context": context,
                        "question": _text(question, "question"),
                        "answers": {
                            "text": [_text(answer, "text") for answer in answers],
                            "answer_start": [int(answer["answer_start"]) for answer in answers],
                        },
                    }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: is not in SQuAD's format: {place} has {reason}.") from error


def _text(part: dict[str, Any], name: str) -> str:
    if not isinstance(part[name], str):
        raise TypeError(f"a {name} that is no text: {part[name]!r:.40}")
    return str(part[name])


def _check_answers(path: Path, row: dict[str, Any]) -> None:
    answers = row["answers"]
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        if not text or start < 0 or row["context"][start : start + len(text)] != text:
            raise DataError(
                f"{path}: question {row['id']}: the answer {text!r:.60} does not stand at "
                f"character {start} of its context."
            )
