"""Words and tags from files in columns, as CoNLL's: a word a line, a blank line after a sentence.

Columns are separated by tabs where a line has one, otherwise by blanks. Lines that begin with
`-DOCSTART-` stand between documents and are left out.
"""

from __future__ import annotations

import re
from pathlib import Path

from datasets import Dataset

from hf_lowrank.errors import DataError
from hf_lowrank.tasks.spans import iob2

_TAG = re.compile(r"O|[BIES]-\S+")


def load_conll(path: str | Path, word_column: int = 1, tag_column: int = 0) -> Dataset:
    """The sentences of a file, in its order.

    Args:
        path: The file, in UTF-8.
        word_column: Number of the column of words, from 1; 0 for the last.
        tag_column: Number of that of tags, likewise.

    Returns:
        The columns `words` and `tags`, lists of equal length; the tags as IOB2.

    Raises:
        DataError: With the line that does not fit.
    """
    path = Path(path)
    try:
        lines = re.split(r"\r\n|\r|\n", path.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}).") from error
    rows: list[dict[str, list[str]]] = []
    words, tags = list[str](), list[str]()
    for number, line in enumerate([*lines, ""], 1):
        if line.strip() and line.split()[0] != "-DOCSTART-":
            word, tag = _cells(path, number, line, (word_column, tag_column))
            words.append(word)
            tags.append(tag)
        elif words:
            rows.append({"words": words, "tags": iob2(tags)})
            words, tags = [], []
    if not rows:
        raise DataError(f"{path}: holds no sentence; expected a word and a tag in each line.")
    return Dataset.from_list(rows)


def _cells(path: Path, number: int, line: str, columns: tuple[int, int]) -> tuple[str, str]:
    """Word and tag of a line."""
    # No other blank: a word may hold one, such as the narrow one between digits.
    cells = [cell.strip() for cell in re.split("\t" if "\t" in line else " +", line.strip(" "))]
    if len(cells) < max(2, *columns):
        raise DataError(
            f"{path}: line {number} has {len(cells)} columns; at least {max(2, *columns)} are "
            "needed for a word and its tag."
        )
    if len({(column - 1) % len(cells) for column in columns}) == 1:
        raise DataError(
            f"{path}: word_column {columns[0]} and tag_column {columns[1]} are the same column of "
            f"the {len(cells)} in line {number}; name two."
        )
    word, tag = (cells[column - 1] for column in columns)
    if not word:
        raise DataError(f"{path}: line {number} has no word in column {columns[0]}.")
    if not _TAG.fullmatch(tag):
        raise DataError(
            f"{path}: line {number} has the tag {tag!r:.60}; expected O, or B, I, E or S with a "
            "type, such as B-PER. Which column holds the tags is set by tag_column."
        )
    return word, tag
