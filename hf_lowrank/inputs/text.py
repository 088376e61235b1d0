"""Text from a file, a dataset on the Hub or the built-in demo, as windows of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from hf_lowrank.errors import DataError
from hf_lowrank.inputs.demo_text import BUILT_IN, built_in_text
from hf_lowrank.inputs.hub import prefer_offline_if_unreachable
from hf_lowrank.inputs.own_text import GENERATED, OwnText
from hf_lowrank.inputs.start_token import start_tokens

_TEXT_COLUMNS = ("text", "content", "sentence", "document")
_MAX_CHARACTERS = 50_000_000
_SHARE = re.compile(r"0?\.\d+|[01](\.0*)?")
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
    at_most: bool = False,
    own_text: OwnText | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Windows of tokens spread evenly over a text, or over several in turn.

    Where the tokenizer puts a start token before a text (`start_tokens`), each window begins with
    one, within its length; it is never scored.

    Args:
        source: See `read_text`; or a mixture, see `shares`.
        tokenizer: A transformers tokenizer.
        sequences: Number of windows.
        sequence_length: Tokens in each window, the start token counted.
        role: What the text is for; decides which part of a built-in text is used.
        part: Share of each text to take the windows from, as (begin, end) in [0, 1]; of built-in
            texts, which are split by role, all is taken.
        batch_size: Windows in a batch.
        at_most: Whether fewer windows will do where the text is too short, but at least one.
        own_text: Writes the windows of the source "generated".

    Returns:
        Batches with `input_ids` of shape (batch, sequence_length); the last may be smaller. Where
        the start is several tokens, also `labels`, -100 on them.

    Raises:
        DataError: A source is missing, unreadable, empty or too short, or its share is wrong.
    """
    start = torch.tensor(start_tokens(tokenizer), dtype=torch.long)
    for name, value, least in (
        ("sequences", sequences, 1),
        ("sequence_length", sequence_length, max(2, len(start) + 1)),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise DataError(f"The {role} {name} must be at least {least}, got {value}.")
    found: list[tuple[float, torch.Tensor]] = []
    for each, count in windows_of_each(source, sequences).items():
        length = sequence_length - len(start)
        if each == GENERATED:
            windows = _written(own_text, count, length, role)
            found += [
                ((i + 0.5) / count, torch.cat([start, window])) for i, window in enumerate(windows)
            ]
            continue
        tokens = _tokens(each, tokenizer, role, part)
        if at_most:
            count = min(count, max(1, len(tokens) // length))
        if len(tokens) < count * length:
            raise DataError(
                f"{each}: {len(tokens)} tokens are there for {role}, but {count} sequences of "
                f"{length} need {count * length}; ask for fewer or shorter sequences, or give "
                "more text."
            )
        stride = (len(tokens) - length) // max(count - 1, 1)
        for i in range(count):
            window = tokens[i * stride : i * stride + length]
            found.append(((i + 0.5) / count, torch.cat([start, window])))
    # In turn, so that the first few windows are a mixture, too; sorting keeps equals in order.
    in_turn = torch.stack([window for _, window in sorted(found, key=lambda item: item[0])])
    return [_batch(ids, len(start)) for ids in in_turn.split(batch_size)]


def _written(own_text: OwnText | None, count: int, length: int, role: str) -> torch.Tensor:
    """Windows that the model writes itself; of a text that it is judged on, they would flatter."""
    if own_text is None or role not in ("calibration", "held_out"):
        raise DataError(
            f"{GENERATED!r} is calibration text of compress_llm.py, written by the model itself; "
            f"it is no {role} text here. Give another text."
        )
    return own_text.windows(count, length, role)


def _tokens(
    source: str,
    tokenizer: Any,  # noqa: ANN401
    role: str,
    part: tuple[float, float],
) -> torch.Tensor:
    """Ids of a part of a text, without any special token."""
    text = read_text(source, role)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin, end = (0.0, 1.0) if source in BUILT_IN else part
    return torch.tensor(ids[int(begin * len(ids)) : int(end * len(ids))], dtype=torch.long)


def _batch(ids: torch.Tensor, num_start: int) -> dict[str, torch.Tensor]:
    if num_start < 2:  # the first token of a window is nobody's target
        return {"input_ids": ids}
    labels = ids.clone()
    labels[:, :num_start] = -100
    return {"input_ids": ids, "labels": labels}


def shares(source: str) -> dict[str, float]:
    """The sources of a mixture with their shares of the windows, which sum to 1.

    Args:
        source: One source, or several with " + " between them; of several, each may end in a share
            ("wiki.txt + mail.txt:0.25"), and those that don't divide what is left equally.

    Raises:
        DataError: The shares don't add up, or a source stands twice.
    """
    sources = [each.strip() for each in source.split(" + ")]
    if len(sources) == 1:
        return {source: 1.0}
    found: dict[str, float | None] = {}
    for each in sources:
        name, _, ending = each.rpartition(":")
        given = float(ending) if name and _SHARE.fullmatch(ending) else None
        name = each if given is None else name
        if name in found:
            raise DataError(f"{name}: stands twice in one mixture; give it one share.")
        found[name] = given
    rest = 1.0 - sum(share for share in found.values() if share is not None)
    open_ones = sum(share is None for share in found.values())
    if 0.0 in found.values() or rest < -1e-9 or (rest < 1e-9) != (open_ones == 0):
        raise DataError(
            f"{source}: the shares of a mixture must be above 0 and sum to 1; a source "
            "without one gets what the others leave."
        )
    return {name: rest / open_ones if share is None else share for name, share in found.items()}


def windows_of_each(source: str, sequences: int) -> dict[str, int]:
    """How many of a number of windows come from each source: largest remainders first.

    Raises:
        DataError: As `shares`; or a source of a mixture would get no window.
    """
    exact = {name: share * sequences for name, share in shares(source).items()}
    counts = {name: int(value + 1e-9) for name, value in exact.items()}
    by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_rest[: sequences - sum(counts.values())]:
        counts[name] += 1
    empty = [name for name, count in counts.items() if count == 0]
    if empty and sequences > 0:
        raise DataError(f"{empty[0]}: its share of {sequences} windows is none; ask for more.")
    return counts


def check_local_text(source: str, role: str) -> None:
    """Reads what of a text is not on the Hub, so that a mistake shows before any long work.

    Raises:
        DataError: As `read_text` and `shares` do.
    """
    for each in shares(source):
        if each in BUILT_IN or Path(each).exists() or _looks_local(each):
            read_text(each, role)


def _looks_local(source: str) -> bool:
    suffixes = (".txt", ".jsonl", ".json", ".parquet", ".raw")
    return source.startswith((".", "/", "~")) or Path(source).suffix.lower() in suffixes


def read_text(source: str, role: str = "calibration") -> str:
    """All text of a source.

    Args:
        source: One of `BUILT_IN` ("demo": the topics of Python's own help), split over the roles;
            a file (.jsonl and .parquet with a text column; anything else is plain UTF-8 text); or
            a dataset on the Hub as `name`, `name:config` or `name:config:split`.
        role: "calibration", "held_out" or "evaluation".

    Raises:
        DataError: Nothing readable is there.
    """
    if source in BUILT_IN:
        return built_in_text(source, role)
    path = Path(source)
    try:
        if path.is_dir():
            raise DataError(f"{source}: is a folder, not a text file; name a file in it.")
        text = _read_file(path) if path.is_file() else _read_hub(source, role)
    except UnicodeDecodeError:
        raise DataError(f"{source}: is not UTF-8 text; convert it first.") from None
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error}).") from error
    if not text.strip():
        raise DataError(f"{source}: holds no text; give another one.")
    return _whole_characters(text[:_MAX_CHARACTERS])


def _whole_characters(text: str) -> str:
    """Joins surrogate pairs, and puts U+FFFD for halves alone: no tokenizer can read those."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    text = path.read_text(encoding="utf-8-sig")
    if suffix not in (".jsonl", ".json"):
        return text
    return _join(_json_rows(path, text), str(path))


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError:
                raise DataError(f"{path}: line {number} is not a JSON object; mend it.") from None
            except RecursionError:
                raise DataError(f"{path}: line {number} is nested too deeply to read.") from None


def _read_parquet(path: Path) -> str:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is not a readable parquet file ({error}).") from error
    return _join(_numbered(rows), str(path))


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _read_hub(source: str, role: str) -> str:
    if _looks_local(source):
        raise DataError(f"{source}: no such file; correct the path.")
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
    return _join(_numbered(taken), source)


def _join(rows: Iterable[tuple[str, Any]], source: str) -> str:
    """The texts of rows, each with its place in the source for the message."""
    texts = []
    for place, row in rows:
        column = next((c for c in _TEXT_COLUMNS if isinstance(row, dict) and c in row), None)
        if column is not None and row[column] is None:
            raise DataError(
                f"{source}: {place} has no text, its {column!r} is null; leave such rows out."
            )
        if column is None or not isinstance(row[column], str):
            raise DataError(
                f"{source}: {place} has no text column; one of {', '.join(_TEXT_COLUMNS)} is "
                "needed."
            )
        texts.append(row[column])
    return "\n\n".join(text for text in texts if text.strip())
