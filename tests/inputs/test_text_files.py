"""Texts in files and data sets: which columns and rows, and what is refused."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from hf_lowrank.errors import DataError
from hf_lowrank.inputs import text as text_module
from hf_lowrank.inputs.text import read_text

Row = dict[str, Any]


# Files


def write_rows(path: Path, rows: list[Row]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a", "a.md"])
def test_other_suffixes_are_plain_text(tmp_path: Path, name: str):
    content = "Grüße\n\n{not json} 文\n"
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_text(str(tmp_path / name)) == content


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("column", ["text", "content", "sentence", "document"])
def test_rows_are_joined_by_blank_lines(tmp_path: Path, suffix: str, column: str):
    rows = [{"id": 1, column: "first\nline"}, {"id": 2, column: " "}, {"id": 3, column: "Ende ß"}]
    source = write_rows(tmp_path / f"rows.{suffix}", rows)
    assert read_text(source) == "first\nline\n\nEnde ß"


def test_the_column_called_text_wins(tmp_path: Path):
    source = write_rows(tmp_path / "rows.jsonl", [{"document": "no", "text": "yes"}])
    assert read_text(source) == "yes"


def test_blank_lines_between_rows_are_ignored(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\r\n\r\n\n{"text": "two"}')
    assert read_text(str(path)) == "one\n\ntwo"


def test_characters_that_end_lines_elsewhere_stay_inside_a_row(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    row = {"text": "one\u2028two\x85three"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_text(str(path)) == row["text"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str):
    content = "plain" if name.endswith("txt") else '{"text": "plain"}\n'
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_text(str(tmp_path / name)) == "plain"


def test_a_very_long_text_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_module, "_MAX_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("0123456789abc")
    assert read_text(str(tmp_path / "a.txt")) == "0123456789"


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "missing.parquet", "missing"])
def test_a_file_that_is_missing(tmp_path: Path, name: str):
    with pytest.raises(DataError, match=rf"{name}: no such file; correct the path\.$"):
        read_text(str(tmp_path / name))


def test_a_relative_file_that_is_missing_is_not_looked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(datasets, "load_dataset", None)
    for name in ("wiki.txt", "./wiki", "~/wiki", "data/wiki.jsonl", "wiki.parquet"):
        with pytest.raises(DataError, match=rf"^{name}: no such file; correct the path\.$"):
            read_text(name)


@pytest.mark.parametrize("name", ["wiki.raw", "data/valid/wiki.valid.raw", "corpus.json", "a.csv"])
def test_a_path_that_no_dataset_can_have_is_not_looked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=rf"^{name}: no such file"):
        read_text(name)


def test_a_folder_is_no_text(tmp_path: Path):
    with pytest.raises(DataError, match="is a folder, not a text file"):
        read_text(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b" \n\t ", b"\n\n"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_file_without_text(tmp_path: Path, content: bytes, suffix: str):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name}: holds no text; give another one\.$"):
        read_text(str(path))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_bytes_that_are_no_text(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"abc\xff\xfe\x00")
    with pytest.raises(DataError, match=rf"{path.name}: is not UTF-8 text; convert it first\.$"):
        read_text(str(path))


def test_a_broken_row_is_named_by_its_line(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl: line 3 is not a JSON object; mend it\.$"):
        read_text(str(path))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("row", [{"body": "a"}, {"text": 3}, {"text": ["a"]}])
def test_a_row_without_text(tmp_path: Path, suffix: str, row: Row):
    source = write_rows(tmp_path / f"rows.{suffix}", [row])
    with pytest.raises(
        DataError, match="1 has no text column; one of text, content, sentence, document is needed"
    ):
        read_text(source)


@pytest.mark.parametrize("line", ["3", "[1]", '"text"', "null"])
def test_a_row_that_is_no_object(tmp_path: Path, line: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match="line 1 has no text column"):
        read_text(str(path))


@pytest.mark.parametrize("content", [b"", b"junk", b"PAR1 something PAR1"])
def test_a_file_that_is_not_parquet(tmp_path: Path, content: bytes):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: is not a readable parquet file \("):
        read_text(str(path))


@pytest.mark.parametrize(("suffix", "place"), [("jsonl", "line"), ("parquet", "row")])
def test_a_row_whose_text_is_null_is_named(tmp_path: Path, suffix: str, place: str):
    source = write_rows(tmp_path / f"rows.{suffix}", [{"text": "a"}, {"text": None}])
    message = rf"{suffix}: {place} 2 has no text, its 'text' is null; leave such rows out\.$"
    with pytest.raises(DataError, match=message):
        read_text(source)


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.Json", "rows.PARQUET"])
def test_suffixes_may_be_written_in_capitals(tmp_path: Path, name: str):
    path = tmp_path / name
    source = write_rows(tmp_path / name.lower(), [{"text": "one"}, {"text": "two"}])
    path = Path(source).rename(path)
    assert read_text(str(path)) == "one\n\ntwo"
    with pytest.raises(DataError, match=r"no such file; correct the path\.$"):
        read_text("missing." + path.suffix)


def test_half_a_character_is_replaced_and_two_halves_are_joined(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "cut \\ud83d emoji \\udc00 whole \\ud83d\\ude00"}\n')
    assert read_text(str(path)) == "cut \ufffd emoji \ufffd whole \U0001f600"


def test_json_that_is_nested_too_deeply(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    with pytest.raises(DataError, match=r"line 2 is nested too deeply to read\.$"):
        read_text(str(path))


# The Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for the Hub; the calls are listed."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, config, split, streaming))
        return iter([{"text": "one"}, {"text": ""}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("source", "role", "call"),
    [
        ("owner/name", "calibration", ("owner/name", None, "train")),
        ("owner/name", "held_out", ("owner/name", None, "train")),
        ("owner/name", "evaluation", ("owner/name", None, "test")),
        ("owner/name:small", "calibration", ("owner/name", "small", "train")),
        ("owner/name:small", "evaluation", ("owner/name", "small", "test")),
        ("owner/name:small:dev", "evaluation", ("owner/name", "small", "dev")),
        ("owner/name::dev", "calibration", ("owner/name", None, "dev")),
    ],
)
def test_a_dataset_is_named_with_config_and_split(
    hub: list[tuple[Any, ...]], source: str, role: str, call: tuple[Any, ...]
):
    assert read_text(source, role) == "one\n\ntwo"
    assert hub == [(*call, True)]


def test_a_local_file_wins_over_a_dataset_of_its_name(
    hub: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("imdb").write_text("local")
    assert read_text("imdb") == "local"
    assert hub == []


def test_no_more_of_a_dataset_is_read_than_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_module, "_MAX_CHARACTERS", 1000)
    read = []

    def rows() -> Any:
        for number in itertools.count():
            read.append(number)
            yield {"text": "x" * 30, "id": number}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows())
    assert read_text("owner/endless") == "\n\n".join(["x" * 30] * 4)
    assert len(read) == 4


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nmore"), ValueError("bad split\n..."), KeyError("config")]
)
def test_a_dataset_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        read_text("owner/name")
    reason = str(error).split("\n", maxsplit=1)[0]
    assert str(caught.value) == (
        "owner/name: no such file, and the Hub has no such dataset or can't be reached "
        f"({reason}); offline, use a local .txt, .jsonl or .parquet file, or 'demo'."
    )
    assert caught.value.__cause__ is error


def test_a_dataset_without_a_text_column(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [{"premise": "a"}])
    with pytest.raises(DataError, match="owner/name: row 1 has no text column"):
        read_text("owner/name")


def test_reading_a_file_loads_no_datasets_library(numbers: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert read_text(numbers).startswith("0 1 2")
