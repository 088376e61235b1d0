"""Text from a file, a dataset on the Hub or the built-in demo, as windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from hf_lowrank.errors import DataError
from hf_lowrank.inputs.hub import prefer_offline_if_unreachable

DEMO = "demo"
ROLES = ("calibration", "held_out", "evaluation")
_TEXT_COLUMNS = ("text", "content", "sentence", "document")
_MAX_CHARACTERS = 50_000_000
_OFFLINE_WAYS = "a local .txt, .jsonl or .parquet file, or 'demo'"


def token_batches(
    source: str,
    tokenizer: Any,  # noqa: ANN401
    *,
    sequences: int,
    sequence_length: int,
    role: str = "calibration",
    part: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 4,
) -> list[dict[str, torch.Tensor]]:
    """Windows of tokens spread evenly over a text.

    Args:
        source: See `read_text`.
        tokenizer: A transformers tokenizer.
        sequences: Number of windows.
        sequence_length: Tokens in each window.
        role: What the text is for; decides which topics of the demo text are used.
        part: Share of the text to take the windows from, as (begin, end) in [0, 1].
        batch_size: Windows in a batch.

    Returns:
        Batches with `input_ids` of shape (batch, sequence_length); the last may be smaller.

    Raises:
        DataError: The source is missing, unreadable, empty or too short.
    """
    for name, value, least in (
        ("sequences", sequences, 1),
        ("sequence_length", sequence_length, 2),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise DataError(f"The {role} {name} must be at least {least}, got {value}.")
    text = read_text(source, role)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = tokens[int(part[0] * len(tokens)) : int(part[1] * len(tokens))]
    if len(tokens) < sequences * sequence_length:
        raise DataError(
            f"{source}: {len(tokens)} tokens are there for {role}, but {sequences} sequences of "
            f"{sequence_length} need {sequences * sequence_length}; ask for fewer or shorter "
            "sequences, or give more text."
        )
    stride = (len(tokens) - sequence_length) // max(sequences - 1, 1)
    ids = torch.tensor(tokens)
    windows = torch.stack(
        [ids[start * stride : start * stride + sequence_length] for start in range(sequences)]
    )
    return [{"input_ids": batch} for batch in windows.split(batch_size)]


def check_local_text(source: str, role: str) -> None:
    """Reads a text that is not on the Hub, so that a mistake shows before any long work.

    Raises:
        DataError: As `read_text` does.
    """
    if source == DEMO or Path(source).exists() or _looks_local(source):
        read_text(source, role)


def _looks_local(source: str) -> bool:
    suffixes = (".txt", ".jsonl", ".json", ".parquet", ".raw")
    return source.startswith((".", "/", "~")) or Path(source).suffix in suffixes


def read_text(source: str, role: str = "calibration") -> str:
    """All text of a source.

    Args:
        source: "demo" (the topics of Python's own help, split by topic over the roles), a file
            (.jsonl and .parquet with a text column; anything else is plain UTF-8 text), or a
            dataset on the Hub as `name`, `name:config` or `name:config:split`.
        role: "calibration", "held_out" or "evaluation".

    Raises:
        DataError: Nothing readable is there.
    """
    if source == DEMO:
        return _demo_text(role)
    path = Path(source)
    try:
        if path.is_dir():
            raise DataError(f"{source}: is a folder, not a text file.")
        text = _read_file(path) if path.is_file() else _read_hub(source, role)
    except UnicodeDecodeError:
        raise DataError(f"{source}: is not UTF-8 text.") from None
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error}).") from error
    if not text.strip():
        raise DataError(f"{source}: holds no text.")
    return text[:_MAX_CHARACTERS]


def _demo_text(role: str) -> str:
    """Half of the topics for calibration, a quarter held out, a quarter for evaluation.

    Some paragraphs stand in several topics; the first role that has one keeps it alone.
    """
    seen: set[str] = set()
    for each, wanted in (("calibration", (0, 2)), ("held_out", (1,)), ("evaluation", (3,))):
        names = [name for i, name in enumerate(sorted(topics)) if i % 4 in wanted]
        paragraphs = [p for name in names for p in topics[name].split("\n\n")]
        own = [p for p in paragraphs if " ".join(p.split()) not in seen]
        if each == role:
            return "\n\n".join(own)
        seen |= {" ".join(p.split()) for p in own}
    raise DataError(f"role must be one of {', '.join(ROLES)}; got {role!r}.")


def _read_file(path: Path) -> str:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix not in (".jsonl", ".json"):
        return text
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                raise DataError(f"{path}: line {number} is not a JSON object.") from None
    return _join(rows, str(path))


def _read_parquet(path: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is not a readable parquet file ({error}).") from error
    return _join(rows, str(path))


def _read_hub(source: str, role: str) -> str:
    if _looks_local(source):
        raise DataError(f"{source}: no such file.")
    from datasets import load_dataset

    prefer_offline_if_unreachable()
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    split = split or ("test" if role == "evaluation" else "train")
    try:
        rows = load_dataset(name, config or None, split=split, streaming=True)
        taken: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            taken.append(row)
            size += sum(len(value) for value in row.values() if isinstance(value, str))
            if size > _MAX_CHARACTERS // 10:
                break
    except Exception as error:  # the datasets library raises many kinds
        reason = str(error).split("\n", maxsplit=1)[0]
        raise DataError(
            f"{source}: no such file, and the Hub has no such dataset or can't be reached "
            f"({reason}); offline, use {_OFFLINE_WAYS}."
        ) from error
    return _join(taken, source)


def _join(rows: Iterable[Any], source: str) -> str:
    texts = []
    for row in rows:
        column = next((c for c in _TEXT_COLUMNS if isinstance(row, dict) and c in row), None)
        if column is None or not isinstance(row[column], str):
            raise DataError(
                f"{source}: a row has no text column; one of {', '.join(_TEXT_COLUMNS)} is needed."
            )
        texts.append(row[column])
    return "\n\n".join(text for text in texts if text.strip())
