"""Checks of single settings."""

from __future__ import annotations

from hf_lowrank.errors import ConfigError


def is_number(value: object) -> bool:
    """Whether a value is a number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_choice(name: str, value: object, allowed: tuple[str | None, ...]) -> None:
    """Refuses a value that is not among the allowed ones.

    Raises:
        ConfigError: With what is allowed.
    """
    if value not in allowed:
        names = ", ".join(filter(None, allowed))
        raise ConfigError(f"{name} must be one of {names}; got {value!r}.")


def check_count(name: str, value: object) -> None:
    """Refuses what is no whole number from 1 on.

    Raises:
        ConfigError: With what came.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be an integer >= 1, got {value!r}.")


def check_seed(value: object) -> None:
    """Refuses what not every generator takes: torch's, numpy's and Python's.

    Raises:
        ConfigError: With what is allowed.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise ConfigError(f"seed must be an integer from 0 to 2**32 - 1, got {value!r}.")
