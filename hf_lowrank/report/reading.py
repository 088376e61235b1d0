"""Reading dataclasses back from JSON: what is there is checked, what is not known is left out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Section = TypeVar("Section")
REST = "others"


def read_section(kind: type[Section], values: object, place: str) -> Section:
    """A dataclass from a JSON object.

    Keys that the class does not know are those of another version: they go into its field
    `others` if it has one, and are left out otherwise.

    Args:
        kind: The dataclass.
        values: The object.
        place: Where it stands in the file, for errors.

    Raises:
        ValueError: It is no object, a field without a default is missing, or a value is of another
            type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{place or 'it'} is no object")
    hints = _hints(kind)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for name, (hint, is_needed) in hints.items():
        path = f"{place}.{name}" if place else name
        if name == REST:
            found[name] = {key: value for key, value in values.items() if key not in hints}
        elif name in values:
            found[name] = _read(hint, values[name], path)
        elif is_needed:
            raise ValueError(f"{path} is missing")
    return kind(**found)


@functools.cache
def _hints(kind: type) -> dict[str, tuple[Any, bool]]:
    """Type of each field, and whether it has no default."""
    types = get_type_hints(kind)
    missing = dataclasses.MISSING
    return {
        each.name: (types[each.name], each.default is each.default_factory is missing)
        for each in dataclasses.fields(kind)
    }


def _read(hint: Any, value: Any, place: str) -> Any:  # noqa: ANN401
    """A value of JSON as a type; null is NaN where a number must stand."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (Any, object):
        return value
    if origin in (Union, UnionType):
        (wanted,) = (each for each in inner if each is not NoneType)
        return None if value is None else _read(wanted, value, place)
    if dataclasses.is_dataclass(hint):
        return read_section(hint, value, place)  # type: ignore[arg-type]
    if origin is dict and isinstance(value, dict):
        return {key: _read(inner[1], each, f"{place}.{key}") for key, each in value.items()}
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        read = [_read(inner[0], each, place) for each in value]
        if origin is list or Ellipsis in inner or len(inner) == len(read):
            return origin(read)
    elif hint is float and value is None:
        return math.nan
    elif _is(value, hint):
        return value
    raise ValueError(f"{place} can't be {str(value)[:40]!r}")


def _is(value: object, hint: object) -> bool:
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)  # type: ignore[arg-type]
