"""`report.json` for readers elsewhere: what it holds, without the folders of this machine."""

from __future__ import annotations

import json
import shlex
from typing import Any

from hf_lowrank.report.card.card_parts import (
    is_local,
    last_component,
    looks_local,
    without_folders,
)
from hf_lowrank.report.schema import report_text

_WITH_SOURCES = ("model", "data", "arguments")


def public_report(text: str) -> str:
    """The text of a `report.json` with only the last component of each local path in it.

    Looks at the model, the texts, the arguments and the command; the rest holds no sources. What
    is no report comes back as it is.
    """
    try:
        report = json.loads(text)
    except ValueError:
        return text
    if not isinstance(report, dict):
        return text
    shortened: dict[str, str] = {}
    for name in _WITH_SOURCES:
        if name in report:
            report[name] = _public(report[name], shortened)
    command = report.get("command")
    if isinstance(command, str):
        report["command"] = _public_command(command, shortened)
    return report_text(report)


def _public(value: Any, shortened: dict[str, str]) -> Any:  # noqa: ANN401
    """The value with each local path in it shortened, which is noted."""
    if isinstance(value, dict):
        return {key: _public(item, shortened) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item, shortened) for item in value]
    if isinstance(value, str) and (is_local(value) or " + " in value):
        shortened[value] = without_folders(value)
        return shortened[value]
    return value


def _public_command(command: str, shortened: dict[str, str]) -> str:
    """The command with every path in it shortened; older ones quote no spaces in known paths."""
    for path in sorted(shortened, key=len, reverse=True):
        command = command.replace(shlex.quote(path), shlex.quote(shortened[path]))
        command = command.replace(path, shortened[path])
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split(" ")
    public = []
    for place, word in enumerate(words):
        option, equals, value = word.rpartition("=")
        # The script is hf_lowrank's own wherever it lies: scripts/x.py says more than x.py.
        is_path = looks_local(value) if place == 1 else is_local(value)
        public.append(option + equals + (last_component(value) if is_path else value))
    return shlex.join(public)
