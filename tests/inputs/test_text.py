"""Text from files, the demo and a stand-in for the Hub; windows of tokens from text."""

import itertools
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from hf_lowrank.errors import DataError
from hf_lowrank.inputs import demo_text
from hf_lowrank.inputs import text as text_module
from hf_lowrank.inputs.demo_text import BUILT_IN, DEMO_GRAPHS, DEMO_LICENSES, ROLES
from hf_lowrank.inputs.text import (
    read_text,
    shares,
    token_batches,
    windows_of_each,
)

Row = dict[str, Any]


class Counting:
    """A tokenizer whose tokens are the numbers in the text, any other word is 0."""

    bos_token_id = None
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
        ids = [int(word) % 10_000 if word.isdigit() else 0 for word in text.split()]
        if settings["add_special_tokens"]:
            ids = [*self.start, *ids, *self.end]
        return {"input_ids": ids}


class Starting(Counting):
    """Puts 5000 before each text."""

    bos_token_id = 5000
    start = (5000,)


class StartingTwice(Counting):
    """Puts two tokens before each text, as GLM does."""

    start = (5000, 6000)


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    """A text of the numbers 0 to 999."""
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(map(str, range(1000))), encoding="utf-8")
    return str(path)


def windows_of(source: str, sequences: int, length: int, **settings: Any) -> list[list[int]]:
    batches = token_batches(
        source, Counting(), sequences=sequences, sequence_length=length, **settings
    )
    return [row for batch in batches for row in batch["input_ids"].tolist()]


# Windows


@pytest.mark.parametrize(("sequences", "length"), [(1, 7), (2, 500), (3, 10), (7, 13), (100, 10)])
def test_windows_are_consecutive_tokens_of_the_text(numbers: str, sequences: int, length: int):
    windows = windows_of(numbers, sequences, length)
    assert len(windows) == sequences
    for window in windows:
        assert window == list(range(window[0], window[0] + length))


@pytest.mark.parametrize(("sequences", "length"), [(2, 500), (3, 10), (7, 13), (100, 10), (9, 111)])
def test_windows_are_spread_evenly_and_do_not_overlap(numbers: str, sequences: int, length: int):
    starts = [window[0] for window in windows_of(numbers, sequences, length)]
    strides = {after - before for before, after in itertools.pairwise(starts)}
    assert starts[0] == 0
    assert len(strides) == 1
    assert min(strides) >= length
    assert 1000 - sequences < starts[-1] + length <= 1000


def test_windows_are_the_same_every_time(numbers: str):
    assert windows_of(numbers, 5, 9) == windows_of(numbers, 5, 9)


def test_batches_have_the_size_asked_for_and_the_rest_comes_last(numbers: str):
    batches = token_batches(numbers, Counting(), sequences=10, sequence_length=6, batch_size=4)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 6), (4, 6), (2, 6)]
    assert all(batch.keys() == {"input_ids"} for batch in batches)
    assert all(batch["input_ids"].dtype == torch.long for batch in batches)


def test_parts_share_no_token(numbers: str):
    first = windows_of(numbers, 25, 30, part=(0.0, 0.75))
    last = windows_of(numbers, 8, 31, part=(0.75, 1.0))
    assert max(max(window) for window in first) < 750 <= min(min(window) for window in last)


def test_a_text_just_long_enough_is_used_up(numbers: str):
    windows = windows_of(numbers, 100, 10)
    assert list(itertools.chain.from_iterable(windows)) == list(range(1000))


def test_each_window_begins_with_the_start_token_within_its_length(numbers: str):
    (first, second) = token_batches(
        numbers, Starting(), sequences=5, sequence_length=101, batch_size=3
    )
    assert first.keys() == second.keys() == {"input_ids"}
    windows = torch.cat([first["input_ids"], second["input_ids"]])
    assert windows.shape == (5, 101)
    assert (windows[:, 0] == 5000).all()
    plain = windows_of(numbers, 5, 100)
    assert windows[:, 1:].tolist() == plain
    assert windows.diff(dim=1)[:, 1:].unique().tolist() == [1]


def test_start_tokens_need_no_text(numbers: str):
    (batch,) = token_batches(numbers, Starting(), sequences=10, sequence_length=101, batch_size=10)
    assert batch["input_ids"][:, 1:].flatten().tolist() == list(range(1000))
    message = "1000 tokens are there for calibration, but 10 sequences of 101 need 1010"
    with pytest.raises(DataError, match=message):
        token_batches(numbers, Starting(), sequences=10, sequence_length=102)


def test_no_token_of_a_longer_start_is_a_target(numbers: str):
    (batch,) = token_batches(numbers, StartingTwice(), sequences=2, sequence_length=6)
    assert batch["input_ids"][0].tolist() == [5000, 6000, 0, 1, 2, 3]
    assert batch["labels"][0].tolist() == [-100, -100, 0, 1, 2, 3]
    with pytest.raises(DataError, match="sequence_length must be at least 3, got 2"):
        token_batches(numbers, StartingTwice(), sequences=2, sequence_length=2)


# Mixtures


@pytest.fixture
def thousands(tmp_path: Path) -> str:
    """A text of the numbers 1000 to 1999."""
    path = tmp_path / "thousands.txt"
    path.write_text(" ".join(map(str, range(1000, 2000))), encoding="utf-8")
    return str(path)


def test_a_mixture_takes_its_shares_in_turn(numbers: str, thousands: str):
    windows = windows_of(f"{numbers} + {thousands}:0.25", 16, 10)
    kinds = [window[0] // 1000 for window in windows]
    assert kinds.count(1) == 4
    assert [sum(kinds[i : i + 4]) for i in range(0, 16, 4)] == [1, 1, 1, 1]
    alone = windows_of(numbers, 12, 10), windows_of(thousands, 4, 10)
    assert [w for w in windows if w[0] < 1000] == alone[0]
    assert [w for w in windows if w[0] >= 1000] == alone[1]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ("a", {"a": 1.0}),
        ("a:0.5", {"a:0.5": 1.0}),  # one source alone has no share
        ("a+b", {"a+b": 1.0}),
        ("a + b", {"a": 0.5, "b": 0.5}),
        ("a  +  b:0.25", {"a": 0.75, "b": 0.25}),
        ("x/y:z:train:0.5 + b:.2 + c", {"x/y:z:train": 0.5, "b": 0.2, "c": pytest.approx(0.3)}),
        ("x/y:z + w/v:1.5", {"x/y:z": 0.5, "w/v:1.5": 0.5}),  # 1.5 is a config's name
    ],
)
def test_shares(sources: str, expected: dict[str, float]):
    assert shares(sources) == expected


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("a:0.5 + b:0.2", r"a:0.5 \+ b:0.2: the shares of a mixture must be above 0 and sum to 1"),
        ("a:0.7 + b:0.4 + c", "must be above 0 and sum to 1"),
        ("a:1 + b", "must be above 0 and sum to 1; a source without one gets what the others"),
        ("a:0 + b", "must be above 0"),
        ("a + a:0.5", "a: stands twice in one mixture; give it one share"),
    ],
)
def test_shares_that_do_not_add_up(sources: str, message: str):
    with pytest.raises(DataError, match=message):
        shares(sources)


@pytest.mark.parametrize(
    ("sources", "sequences", "expected"),
    [
        ("a + b", 5, [3, 2]),
        ("a + b:0.25", 32, [24, 8]),
        ("a + b + c", 64, [22, 21, 21]),
        ("a:0.9 + b", 10, [9, 1]),
    ],
)
def test_the_windows_of_a_mixture_add_up(sources: str, sequences: int, expected: list[int]):
    assert list(windows_of_each(sources, sequences).values()) == expected


def test_a_share_without_a_window_is_refused():
    with pytest.raises(DataError, match="b: its share of 4 windows is none; ask for more"):
        windows_of_each("a + b:0.1", 4)


@pytest.mark.parametrize(
    ("sequences", "length", "part", "there", "needed"),
    [(101, 10, (0.0, 1.0), 1000, 1010), (1, 251, (0.75, 1.0), 250, 251)],
)
def test_too_little_text_is_counted(
    numbers: str,
    sequences: int,
    length: int,
    part: tuple[float, float],
    there: int,
    needed: int,
):
    message = (
        f"{there} tokens are there for held_out, but {sequences} sequences of {length} need "
        f"{needed}; ask for fewer or shorter sequences, or give more text"
    )
    with pytest.raises(DataError, match=message):
        windows_of(numbers, sequences, length, role="held_out", part=part)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("sequences", 0),
        ("sequences", -1),
        ("sequence_length", 1),
        ("sequence_length", 0),
        ("sequence_length", -5),
        ("batch_size", 0),
        ("batch_size", -2),
    ],
)
def test_a_count_that_is_too_small_is_named_with_its_value(numbers: str, setting: str, value: int):
    settings = {"sequences": 2, "sequence_length": 8, "batch_size": 2, setting: value}
    with pytest.raises(DataError, match=rf"{setting}.*got {value}\b"):
        token_batches(numbers, Counting(), **settings)


def test_counts_are_checked_before_the_text_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_module, "read_text", None)
    with pytest.raises(DataError, match=r"calibration.sequences"):
        token_batches("demo", Counting(), sequences=0, sequence_length=8)


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


# The demo


def paragraphs(text: str) -> set[str]:
    """Paragraphs that say something, however they are indented."""
    found = {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}
    return {paragraph for paragraph in found if len(paragraph) >= 40}


@pytest.mark.parametrize("source", BUILT_IN)
@pytest.mark.parametrize(("role", "other"), list(itertools.combinations(ROLES, 2)))
def test_the_roles_of_a_built_in_text_share_no_paragraph(source: str, role: str, other: str):
    """Some topics repeat others: 'if' and 'else' are the same, 'compound' quotes both."""
    one, two = (paragraphs(read_text(source, name)) for name in (role, other))
    shared = one & two
    assert not shared, f"{len(shared)} of {len(two)} paragraphs of {other} are also for {role}"


@pytest.mark.parametrize("role", ROLES)
def test_the_built_in_texts_have_nothing_in_common(role: str):
    for one, other in itertools.combinations(BUILT_IN, 2):
        assert not paragraphs(read_text(one, role)) & paragraphs(read_text(other, role))


def test_the_other_built_in_texts_are_prose_and_long_enough():
    """A quarter of the calibration of the demo, and all of its foreign evaluation."""
    assert len(read_text(DEMO_GRAPHS, "calibration")) > 4 * 16 * 256
    assert len(read_text(DEMO_GRAPHS, "held_out")) > 4 * 8 * 256
    assert len(read_text(DEMO_LICENSES, "evaluation")) > 4 * 16 * 256  # fewer windows will do
    assert "shortest path" in read_text(DEMO_GRAPHS)
    assert "copyright" in read_text(DEMO_LICENSES).lower()


def test_built_in_texts_are_split_by_role_already():
    settings = {"sequences": 3, "sequence_length": 64, "role": "held_out"}
    whole = token_batches("demo", Counting(), **settings)
    (batch,) = token_batches("demo", Counting(), part=(0.75, 1.0), **settings)
    assert torch.equal(batch["input_ids"], whole[0]["input_ids"])


def test_fewer_windows_will_do_where_the_text_is_too_short(numbers: str):
    settings = {"sequences": 30, "sequence_length": 100, "batch_size": 64}
    (batch,) = token_batches(numbers, Counting(), at_most=True, **settings)
    assert batch["input_ids"].shape == (10, 100)
    with pytest.raises(DataError, match="1000 tokens are there for calibration, but 1 sequences"):
        token_batches(numbers, Counting(), sequences=2, sequence_length=2000, at_most=True)


def test_a_built_in_text_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch):
    for read in BUILT_IN.values():
        read.cache_clear()  # type: ignore[attr-defined]
    monkeypatch.setattr(demo_text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="demo-graphs: needs networkx, which comes with torch"):
        read_text(DEMO_GRAPHS)
    monkeypatch.setattr(demo_text, "_LICENSED", ("no-such-package",))
    with pytest.raises(DataError, match="demo-licenses: no dependency is installed with its"):
        read_text(DEMO_LICENSES)


@pytest.mark.parametrize(
    ("role", "tokens"),
    [("calibration", 64 * 256), ("held_out", 32 * 256), ("evaluation", 32 * 256)],
)
def test_every_role_of_the_demo_has_enough_text_for_the_defaults(role: str, tokens: int):
    characters_per_token = 4
    assert len(read_text("demo", role)) > characters_per_token * tokens


def test_the_demo_text_comes_from_the_help_topics():
    everything = paragraphs("\n\n".join(topics.values()))
    for role in ROLES:
        found = paragraphs(read_text("demo", role))
        assert len(found - everything) <= 0.05 * len(found)


def test_most_of_the_demo_is_for_calibration():
    sizes = {role: len(read_text("demo", role)) for role in ROLES}
    assert max(sizes, key=lambda role: sizes[role]) == "calibration"


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
