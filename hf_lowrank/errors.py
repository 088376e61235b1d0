"""Errors for users' mistakes, bad data and failed I/O; broken internal contracts raise builtins.

All of them are `LowRankError`, so a script can turn each into one line on stderr. Each leaf is
also the builtin error that a caller would expect, so `except ValueError` works as well.
modeling_lowrank.py also runs without this package, so it raises ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class LowRankError(Exception):
    """Base class of all errors raised by hf_lowrank."""


class ConfigError(LowRankError, ValueError):
    """A setting has a wrong value, or two settings contradict each other."""


class TargetError(LowRankError, ValueError):
    """The requested layers do not exist in the model or cannot be factorized."""


class DataError(LowRankError, ValueError):
    """A text, dataset or model source is missing, unreadable or too small."""


class CheckpointError(LowRankError, ValueError):
    """A checkpoint is corrupt, or its config does not fit its tensors."""


class NumericalError(LowRankError, RuntimeError):
    """A computation gave NaN or infinity, or a decomposition failed."""


class StorageError(LowRankError, RuntimeError):
    """A file or folder could not be written."""


class PublishError(LowRankError, RuntimeError):
    """The Hub can't be reached, or does not accept a model; nothing was published."""


def already_quantized(what: str, method: object) -> TargetError:
    """What to say where another quantizer has made the weights."""
    return TargetError(
        f"{what} is quantized ({method}); factorizing needs dense weights, so take the model that "
        "it was made from."
    )


@contextmanager
def in_layer(name: str, advice: str) -> Iterator[None]:
    """Says of an arithmetic failure within the block in which layer it was, and what to do.

    Raises:
        NumericalError: The same, so told.
    """
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}. {advice}") from error
