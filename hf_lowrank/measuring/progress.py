"""How far a long loop is: a bar where there is a terminal, a line every half minute where not."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")
SECONDS = 30.0  # between two lines
_SUBJECT: ContextVar[str] = ContextVar("subject", default="")


@contextmanager
def working_on(model: str) -> Iterator[None]:
    """Puts a model's name in front of every line within."""
    token = _SUBJECT.set(model)
    try:
        yield
    finally:
        _SUBJECT.reset(token)


def announce(phase: str) -> None:
    """Says on stderr that a phase without steps begins, where there is no terminal for a bar."""
    if not sys.stderr.isatty():
        _say(phase)


class Progress:
    """Counts the steps of a phase and shows them.

    Args:
        phase: What is done ("calibrate", "evaluate dense"); None shows nothing.
        total: Number of steps, or None if it is not known.
        unit: What the steps are.
    """

    def __init__(self, phase: str | None, total: int | None, unit: str = "batches") -> None:
        self.phase, self.total, self.unit = phase, total, unit
        self.done = 0
        self._begin = self._said = time.monotonic()
        self._bar: tqdm[None] | None = None
        if phase is None:
            return
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=phase, unit=unit, leave=False)
        else:
            self._say_share()

    def update(self, steps: int = 1, note: str = "") -> None:
        """Some steps are done.

        Args:
            steps: How many.
            note: What the last one was about, such as a layer's name.
        """
        self.done += steps
        if self._bar is not None:
            self._bar.set_postfix_str(note)
            self._bar.update(steps)
        elif self.phase is not None and time.monotonic() - self._said >= SECONDS:
            self._said = time.monotonic()
            seconds = self._said - self._begin
            passed = f", {seconds:.0f} s"
            if self.total and self.done:
                passed += f", {seconds / self.done * (self.total - self.done):.0f} s left"
            self._say_share(f"{passed}, {note}" if note else passed)

    def _say_share(self, more: str = "") -> None:
        total = "" if self.total is None else f" of {self.total}"
        share = f", {self.done / self.total:.0%}" if self.total else ""
        _say(f"{self.phase}: {self.done}{total} {self.unit}{share}{more}")

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        """Itself."""
        return self

    def __exit__(self, *details: object) -> None:
        """Takes the bar away, also after an error."""
        self.close()


def track(items: Iterable[Item], phase: str | None, unit: str = "batches") -> Iterator[Item]:
    """The items, counted as they are used up; see `Progress`.

    Args:
        items: What a loop goes through.
        phase: As for `Progress`.
        unit: As for `Progress`; items that are strings are named, too.
    """
    total = len(items) if isinstance(items, Sized) else None
    with Progress(phase, total, unit) as progress:
        for item in items:
            yield item
            progress.update(note=item if isinstance(item, str) else "")


def _say(text: str) -> None:
    subject = _SUBJECT.get()
    print(f"... {subject}: {text}" if subject else f"... {text}", file=sys.stderr, flush=True)
