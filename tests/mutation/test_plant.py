"""The tool that plants bugs: what it counts, and that its groups name what exists."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.mutation import plant

tomllib = pytest.importorskip("tomllib", reason="Python 3.11")


def line(outcome: str | None) -> str:
    place = {"module_path": "a.py", "start_pos": [7, 0], "operator_name": "op", "occurrence": 2}
    return json.dumps([{"mutations": [place]}, outcome and {"test_outcome": outcome}])


def test_survivors_are_named_and_the_share_is_of_what_was_tested(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lines = [line(found) for found in ("killed", "survived", "killed", "incompetent", None)]

    def run(*args: Any, **kwargs: Any) -> Any:
        return type("Done", (), {"stdout": "\n".join(lines)})()

    monkeypatch.setattr(subprocess, "run", run)
    plant.report("some", "cosmic-ray", Path("session"))
    assert capsys.readouterr().out.splitlines() == [
        "survived: a.py:7: op 2",
        "some: 3 of 4 mutants killed, 75.0% +- 21.7%; 1 are left",
    ]
    lines.pop()
    plant.report("some", "cosmic-ray", Path("session"))
    assert capsys.readouterr().out.splitlines()[1] == "some: 3 of 4 mutants killed, 75.0%"


def test_an_unknown_group_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        plant.main(["magic"])
    assert "no group magic; groups: decomposition, ranks, channels" in capsys.readouterr().err


def test_groups_name_what_exists():
    groups = tomllib.loads((plant.HERE / "groups.toml").read_text("utf-8"))
    for group in groups.values():
        assert all((plant.ROOT / path).exists() for path in [*group["modules"], *group["tests"]])
