"""What README says is true: its Python runs, its commands, scripts, options and links exist."""

import ast
import dataclasses
import importlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.commands import COMMANDS
from benchmarks.searches.search import SEARCHES
from hf_lowrank.cli.arguments import CompressionArguments, PublishingArguments
from hf_lowrank.cli.encoder_arguments import EncoderArguments
from hf_lowrank.cli.export_command import ENGINES, ExportArguments
from hf_lowrank.cli.training_command import LanguageModelArguments, LanguageModelTrainingArguments
from hf_lowrank.compression.recovery import RECOVERIES
from hf_lowrank.config import LABEL_SOURCES, METRIC_NAMES, OBJECTIVES, RULE_NAMES, WEIGHT_TYPES
from hf_lowrank.format.forms.stored_form import form_names
from hf_lowrank.inputs.sources import DTYPES
from hf_lowrank.measuring.embeddings import POOLINGS
from hf_lowrank.tasks.glue import GlueArguments
from hf_lowrank.tasks.ner import NerArguments
from hf_lowrank.tasks.qa import QaArguments
from hf_lowrank.tasks.task_arguments import METHOD_NAMES
from hf_lowrank.training.training_arguments import SELECTION_RULES
from tests.scripts import ROOT, script_module

PACKAGE = ROOT / "hf_lowrank"
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ARGUMENTS: dict[str, tuple[type, ...]] = {
    "compress_llm": (CompressionArguments, PublishingArguments),
    "compress_encoder": (EncoderArguments, PublishingArguments),
    "run_glue": (GlueArguments, PublishingArguments),
    "run_ner": (NerArguments, PublishingArguments),
    "run_qa": (QaArguments, PublishingArguments),
    "evaluate_model": (script_module("evaluate_model").EvaluationArguments,),
    "export": (ExportArguments,),
    "generate": (script_module("generate").GenerationArguments,),
    "train_llm": (LanguageModelArguments, LanguageModelTrainingArguments, PublishingArguments),
}
# Options with fixed choices, of whatever script.
CHOICES: dict[str, Collection[str]] = {
    "metric": METRIC_NAMES,
    "rule": (*RULE_NAMES, *SEARCHES),
    "form": form_names(),
    "weights": [name for name in WEIGHT_TYPES if name],
    "objective": OBJECTIVES,
    "label_source": LABEL_SOURCES,
    "recover": [*RECOVERIES],
    "method": METHOD_NAMES,
    "methods": METHOD_NAMES,
    "dtype": [*DTYPES],
    "pooling": POOLINGS,
    "to": [*ENGINES],
    "selection_rule": SELECTION_RULES,
}
NOT_RUN = re.compile(r"<!--\s*not run:\s*(?P<reason>[^>]*?)\s*-->\s*\Z")
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a Markdown file.

    Attributes:
        language: First word after the fence.
        code: The block's text.
        line: Number of the first line of code.
        reason: Why the block is not run, or None if it is.
    """

    language: str
    code: str
    line: int
    reason: str | None


def fenced_blocks(text: str) -> list[Block]:
    blocks = []
    for match in FENCE.finditer(text):
        before = NOT_RUN.search(text[: match.start()])
        words = match["info"].split() or [""]
        blocks.append(
            Block(
                words[0],
                match["body"],
                text.count("\n", 0, match.start("body")) + 1,
                before["reason"] if before else None,
            )
        )
    return blocks


def python_blocks(text: str) -> list[Block]:
    return [block for block in fenced_blocks(text) if block.language == "python"]


def run_blocks(blocks: list[Block], name: str) -> dict[str, object]:
    """Runs blocks in one namespace, as a reader would who copies them in order."""
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        if block.reason is None:
            padding = "\n" * (block.line - 1)  # errors name the line of the file
            exec(compile(padding + block.code, name, "exec"), namespace)
    return namespace


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z]+):", text, re.MULTILINE))


def script_calls(text: str) -> list[tuple[str, set[str]]]:
    """(script and benchmark's command, options) of each command line, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    calls = re.findall(r"python3? scripts/(benchmark\.py [\w-]+|\w+\.py)([^\n`]*)", joined)
    return [(script, set(re.findall(r"--([a-z]\w*)", rest))) for script, rest in calls]


def option_values(text: str) -> set[tuple[str, str]]:
    """(option, value) of all command lines; placeholders such as FOLDER are left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = set()
    for rest in re.findall(r"python3? scripts/\w+\.py([^\n`]*)", joined):
        for name, values in re.findall(r"--(\w+)((?: +[^\s-]\S*)*)", rest):
            found |= {(name, value) for value in values.split() if not value.isupper()}
    return found


def anchors(text: str) -> set[str]:
    """What `#...` links to a page may name: its headings as GitHub writes them."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


# README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_python_in_the_pages_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = page.read_text("utf-8")
    blocks = python_blocks(text)
    mentioned = text.count("```python")
    assert len(blocks) == mentioned, (
        f"{page.name} mentions ```python {mentioned} times, but {len(blocks)} complete blocks were "
        "found; a fence is indented or not closed."
    )
    run_blocks(blocks, page.name)


def test_blocks_that_are_not_run_give_a_reason():
    marks = re.findall(r"<!--\s*not run\b(.*?)-->", README, re.DOTALL)
    skipped = [block for block in python_blocks(README) if block.reason is not None]
    assert all(len(block.reason or "") >= 10 for block in skipped)
    assert len(marks) == len(skipped), "a 'not run' comment does not stand right above a block"


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_readme_names_the_two_commands(command: str):
    assert command in README


def test_make_targets_in_readme_exist():
    used = set(re.findall(r"(?:^|[`$;&]|\b&& )\s*make ([a-z]+)", README, re.MULTILINE))
    assert used <= make_targets(), f"README.md names make targets that do not exist: {used}"


def test_scripts_in_readme_exist():
    named = set(re.findall(r"\bscripts/[\w/]+\.py\b", README))
    missing = sorted(name for name in named if not (ROOT / name).is_file())
    assert not missing, f"README.md names scripts that do not exist: {missing}"


def options_of(script: str) -> set[str]:
    """Options of a script: the fields of its arguments, or else every word in it."""
    file, *command = script.split()
    kinds = ARGUMENTS.get(file.removesuffix(".py"), ())
    if command:
        kinds = (COMMANDS[command[0]][0],)
    fields = [field for kind in kinds for field in dataclasses.fields(kind)]
    switches = {f"no_{field.name}" for field in fields if "bool" in str(field.type)}
    return {field.name for field in fields} | switches or set(
        re.findall(r"\w+", (ROOT / "scripts" / file).read_text("utf-8"))
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_scripts_in_the_pages_exist(page: Path):
    for script, options in script_calls(page.read_text("utf-8")):
        unknown = options - options_of(script)
        assert not unknown, f"scripts/{script} has no such options: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_values_of_options_in_the_pages_are_among_those_allowed(page: Path):
    named = option_values(page.read_text("utf-8"))
    unknown = {(name, value) for name, value in named if value not in CHOICES.get(name, [value])}
    assert not unknown, f"{page.name} gives options values that are refused: {unknown}"


def test_names_that_readme_imports_exist():
    """Also in blocks that are not run."""
    for block in python_blocks(README):
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and node.module:
                owner, names = node.module, [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "hf_lowrank":
                owner, names = "hf_lowrank", [node.attr]
            else:
                continue
            for name in names:
                assert hasattr(importlib.import_module(owner), name), f"line {block.line}: {name}"


def test_no_placeholder_is_left_in_readme():
    left = re.findall(r"@@\w*@@|\bTODO\b|\bTBD\b|\bXXX\b", README)
    assert not left


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path):
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text("utf-8"))
    missing = sorted(target for target in targets if not (page.parent / target).exists())
    assert not missing, f"{page.name} links to files that do not exist: {missing}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_code_and_tests_that_a_page_names_exist(page: Path):
    """As `folder/file.py`, `folder/` or `tests/folder`, from the root or from the package."""
    if page.name == "LOG.md":  # a diary names what was there on a day
        pytest.skip("says what was there")
    named = re.findall(r"`([\w.-]+/[\w./-]*)`", page.read_text("utf-8"))
    code = [name for name in named if name.endswith((".py", "/")) or name.startswith("tests/")]
    places = (ROOT, PACKAGE)
    missing = sorted(n for n in code if not any((place / n).exists() for place in places))
    assert not missing, f"{page.name} names code that does not exist: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_find_them(page: Path):
    text = page.read_text("utf-8")
    missing = []
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*\.md|)#([^)\s]+)\)", text):
        other = (page.parent / target).read_text("utf-8") if target else text
        if anchor not in anchors(other):
            missing.append(f"{target}#{anchor}")
    assert not missing, f"{page.name} links to headings that do not exist: {missing}"


# The checks themselves


EXAMPLE = """\
text
```python
answer = 6 * 7
```

<!-- not run: needs the network for a while -->
```python
raise AssertionError
```
```python
doubled = answer * 2
```
```bash
make demo
```
"""


def test_blocks_are_found_with_language_line_and_reason():
    blocks = fenced_blocks(EXAMPLE)
    assert [block.language for block in blocks] == ["python", "python", "python", "bash"]
    assert [block.line for block in blocks] == [3, 8, 11, 14]
    assert [block.reason for block in blocks] == [
        None,
        "needs the network for a while",
        None,
        None,
    ]


def test_blocks_share_a_namespace_and_skipped_ones_do_not_run():
    assert run_blocks(python_blocks(EXAMPLE), "example")["doubled"] == 84


def test_calls_of_scripts_are_found_with_their_options():
    text = (
        "text `python scripts/a.py --one 1`\n    python scripts/b.py --two-three x \\\n  --four\n"
    )
    text += "python scripts/benchmark.py glue-size --three\n"
    assert script_calls(text) == [
        ("a.py", {"one"}),
        ("b.py", {"two", "four"}),
        ("benchmark.py glue-size", {"three"}),
    ]


def test_values_are_found_beside_their_options():
    text = "`python scripts/a.py --one 1 FOLDER --two`\n"
    text += "    python scripts/b.py --two x \\\n  y --no 5\n"
    assert option_values(text) == {("one", "1"), ("two", "x"), ("two", "y"), ("no", "5")}


def test_anchors_are_those_of_headings_outside_code():
    text = "# One Two\n```\n# no heading\n```\n## `a-b`, all + one\n"
    assert anchors(text) == {"one-two", "a-b-all--one"}


def test_an_error_in_a_block_names_its_line():
    broken = EXAMPLE.replace("answer * 2", "answer * nothing")
    with pytest.raises(NameError, match="nothing") as caught:
        run_blocks(python_blocks(broken), "example")
    assert caught.traceback[-1].lineno == 10  # counted from 0
