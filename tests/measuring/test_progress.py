"""Progress without a terminal: a line at the start, one every half minute."""

import sys

import pytest

from hf_lowrank.measuring import progress
from hf_lowrank.measuring.progress import Progress, announce, track, working_on


class Clock:
    """A clock that stands still until it is moved."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_at_the_start_and_every_half_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
):
    with working_on("demo"):
        for name in track(["a", "b", "c", "d", "e"], "decompose", "layers"):
            if name == "a":
                assert lines(capsys) == ["... demo: decompose: 0 of 5 layers, 0%"]
            clock.now += 12.5
    assert lines(capsys) == ["... demo: decompose: 3 of 5 layers, 60%, 38 s, 25 s left, c"]


def test_steps_of_unknown_number(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with Progress("read", None, "rows") as shown:
        clock.now = 31.0
        shown.update(7)
        shown.update(7)
    assert lines(capsys) == ["... read: 0 rows", "... read: 7 rows, 31 s"]


def test_nothing_is_said_without_a_phase(clock: Clock, capsys: pytest.CaptureFixture[str]):
    for _ in track(range(3), None):
        clock.now += 100
    assert lines(capsys) == []


def test_a_terminal_gets_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    announce("load")
    for _ in track(range(3), "calibrate"):
        clock.now += 100
    shown = capsys.readouterr().err
    assert "calibrate" in shown
    assert "..." not in shown


def test_a_phase_without_steps_is_announced(capsys: pytest.CaptureFixture[str]):
    with working_on("demo"):
        announce("load")
    announce("load")
    assert lines(capsys) == ["... demo: load", "... load"]
