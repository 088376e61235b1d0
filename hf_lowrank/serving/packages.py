"""Whether the packages of an engine are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from hf_lowrank.errors import ConfigError


def check_packages(what: str, names: Iterable[str], extra: str) -> None:
    """Refuses work whose packages are not installed.

    Args:
        what: What needs them, in the plural, for the message.
        names: As they are imported, such as "optimum.intel".
        extra: The extra of this package that brings them.

    Raises:
        ConfigError: With what is missing.
    """
    missing = [name for name in names if not _is_there(name)]
    if missing:
        raise ConfigError(
            f"{what} need {', '.join(missing)}: pip install 'hf-lowrank[{extra}]', as "
            "docs/serving.md says."
        )


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package around it is missing
        return False
