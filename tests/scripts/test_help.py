"""`--help` of every script: it names and explains every option, and fits the terminal."""

import dataclasses

import pytest
from transformers import TrainingArguments

from benchmarks.commands import COMMANDS
from tests.scripts import ROOT, InProcess
from tests.test_docs import ARGUMENTS

COLUMNS = 100
BENCHMARKS = {name: kind for name, (kind, _) in COMMANDS.items()}
CASES = [
    *((script, (), kinds) for script, kinds in ARGUMENTS.items()),
    *(("benchmark", (name,), (kind,)) for name, kind in BENCHMARKS.items()),
]
INHERITED = {field.name for field in dataclasses.fields(TrainingArguments)}


def squeezed(text: str) -> str:
    """Without the places where lines were broken."""
    return "".join(text.split())


@pytest.mark.parametrize(("script", "words", "kinds"), CASES, ids=str)
def test_help_names_and_explains_every_option(
    script: str,
    words: tuple[str, ...],
    kinds: tuple[type, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    done = InProcess(script, monkeypatch, capsys)(*words, "--help")
    assert done.code == 0
    assert done.err == ""
    text = squeezed(done.out)
    for kind in kinds:
        for field in dataclasses.fields(kind):
            if not field.init:
                continue
            assert f"--{field.name}" in done.out
            if field.name not in INHERITED:
                explained = field.metadata["help"]
                assert len(explained) > 10
                assert squeezed(explained.replace("%%", "%")) in text
    # argparse breaks neither the names of an option nor a list of choices
    lines = [line for line in done.out.splitlines() if not line.lstrip(" [").startswith("-")]
    assert [line for line in lines if len(line) > COLUMNS and "{" not in line] == []


@pytest.mark.parametrize("script", ["benchmark", "compare_reports"])
def test_help_of_the_scripts_without_a_dataclass(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    done = InProcess(script, monkeypatch, capsys)("--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("usage: ")
    assert all(name in done.out for name in (BENCHMARKS if script == "benchmark" else ["--output"]))


def test_no_script_is_forgotten():
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert scripts == {*ARGUMENTS, "benchmark", "compare_reports"}
