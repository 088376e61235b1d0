"""Windows of tokens from text, and mixtures of texts."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowrank.errors import DataError
from hf_lowrank.inputs import text as text_module
from hf_lowrank.inputs.text import shares, token_batches, windows_of_each
from tests.inputs import Counting


class Starting(Counting):
    """Puts 5000 before each text."""

    bos_token_id = 5000
    start = (5000,)


class StartingTwice(Counting):
    """Puts two tokens before each text, as GLM does."""

    start = (5000, 6000)


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


def test_fewer_windows_will_do_where_the_text_is_too_short(numbers: str):
    settings = {"sequences": 30, "sequence_length": 100, "batch_size": 64}
    (batch,) = token_batches(numbers, Counting(), at_most=True, **settings)
    assert batch["input_ids"].shape == (10, 100)
    with pytest.raises(DataError, match="1000 tokens are there for calibration, but 1 sequences"):
        token_batches(numbers, Counting(), sequences=2, sequence_length=2000, at_most=True)
