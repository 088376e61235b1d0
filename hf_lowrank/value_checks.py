"""What a setting may be: one clear sentence where it is something else."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import TypeGuard

from hf_lowrank.errors import ConfigError


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_choice(name: str, value: object, allowed: Iterable[str | None]) -> None:
    """Refuses what is not one of some names, or None where that is among them.

    Raises:
        ConfigError: With what is allowed.
    """
    known = list(allowed)
    if value not in known:
        names = ", ".join(filter(None, known))
        raise ConfigError(f"{name} must be one of {names}; got {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Refuses what is neither a truth value nor None.

    Raises:
        ConfigError: With the value.
    """
    if not isinstance(value, (bool, type(None))):
        raise ConfigError(f"{name} must be true, false or left open, got {value!r}.")


def check_between(name: str, value: object, interval: str) -> None:
    """Refuses what is no number within an interval such as "(0, 1]".

    Raises:
        ConfigError: With the value and the interval.
    """
    low, high = map(float, interval[1:-1].split(","))
    is_inside = is_number(value) and low <= value <= high
    if not is_inside or (value in (low, high) and interval[0 if value == low else -1] in "()"):
        raise ConfigError(f"{name} must lie in {interval}, got {value!r}.")


def check_not_negative(name: str, value: object) -> None:
    """Refuses what is no finite number from 0 on.

    Raises:
        ConfigError: With the value.
    """
    if not (is_number(value) and 0 <= value < math.inf):
        raise ConfigError(f"{name} must be a number >= 0, got {value!r}.")


def check_goal_values(ratio: object, tolerance: object, megabytes: object) -> None:
    """Refuses goals that are out of range; None is a goal that is not set.

    Raises:
        ConfigError: With the first.
    """
    if ratio is not None and not (is_number(ratio) and 0 < ratio <= 1):
        raise ConfigError(
            f"param_ratio is the kept share of the parameters and must lie in (0, 1], got "
            f"{ratio!r}."
        )
    if tolerance is not None and not (is_number(tolerance) and 0 <= tolerance < math.inf):
        raise ConfigError(f"loss_tolerance must be a number >= 0 (nats), got {tolerance!r}.")
    if megabytes is not None and not (is_number(megabytes) and 0 < megabytes < math.inf):
        raise ConfigError(f"megabytes must be a number > 0 (10^6 bytes), got {megabytes!r}.")


def check_positive(name: str, value: object) -> None:
    """Refuses what is no finite number above 0.

    Raises:
        ConfigError: With the value.
    """
    if not (is_number(value) and 0 < value < math.inf):
        raise ConfigError(f"{name} must be a number > 0, got {value!r}.")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuses what is no integer from 1 on, or from another one.

    Raises:
        ConfigError: With the value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be an integer >= {least}, got {value!r}.")


def check_read(name: str, value: object, kind: str, choice: str, readers: Collection[str]) -> None:
    """Refuses a setting that the chosen one of a kind does not read.

    Args:
        name: Of the setting.
        value: What it was set to.
        kind: Of what reads it, such as "metric".
        choice: Which one was chosen.
        readers: Those that read it.

    Raises:
        ConfigError: With the readers.
    """
    if choice not in readers:
        raise ConfigError(
            f"{name}={value!r} would do nothing with {kind} {choice!r}: it is read with {kind} "
            f"{' or '.join(readers)}. Leave it out, or choose such a {kind}."
        )


def check_seed(value: object) -> None:
    """Refuses what some generator of random numbers would not take.

    Raises:
        ConfigError: With the limits.
    """
    # What every generator takes: torch's, numpy's and Python's.
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise ConfigError(f"seed must be an integer from 0 to 2**32 - 1, got {value!r}.")


def listed_names(name: str, value: object) -> list[str] | None:
    """A list of names as one; a single name becomes a list.

    Raises:
        ConfigError: It is something else.
    """
    listed = [value] if isinstance(value, str) else value
    if listed is None:
        return None
    if isinstance(listed, (list, tuple)) and all(isinstance(item, str) for item in listed):
        return list(listed)
    raise ConfigError(f"{name} must be a list of names, got {value!r}.")


def check_ranks(name: str, value: object) -> None:
    """Refuses anything but a dict from names to counts or None.

    Raises:
        ConfigError: With the setting and its value.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must map names to ranks, got {value!r}.")
    for layer, rank in value.items():
        if not isinstance(layer, str):
            raise ConfigError(f"{name} must map names to ranks, got the name {layer!r}.")
        if rank is not None:
            check_count(f"{name}[{layer!r}]", rank)
