"""`modeling_lowrank.py`, which is put together from the modules of `format/`."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import hf_lowrank.format
from hf_lowrank.format.bundle import loading_code
from tests.test_imports import SOURCES, TREES

FOLDER = Path(hf_lowrank.format.__file__).parent
# Read or write checkpoints beside transformers' own loader, so a checkpoint need not carry them.
LEFT_OUT = {"bundle", "feed_forward", "headers", "strict"}
MODULES = ["hf_lowrank.errors"] + [
    name
    for name, path in SOURCES.items()
    if FOLDER in path.parents and path.stem not in {"__init__", *LEFT_OUT}
]
TREE = ast.parse(loading_code())
IMPORT = """
import importlib, sys
sys.modules["hf_lowrank"] = None
sys.path.insert(0, sys.argv[1])
importlib.import_module("modeling_lowrank")
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(AUTO_QUANTIZER_MAPPING["lowrank"].__module__)
"""


def defined(tree: ast.Module) -> list[str]:
    """Names that a module binds itself, apart from imports."""
    names = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


@pytest.mark.parametrize("name", MODULES)
def test_every_module_is_in_the_bundle(name):
    own = {ast.unparse(node) for node in TREE.body}
    parts = [n for n in TREES[name].body[1:] if not isinstance(n, (ast.Import, ast.ImportFrom))]
    assert parts
    assert {ast.unparse(node) for node in parts} <= own
    assert f"# From {name}:" in loading_code()


def test_nothing_else_is_in_the_bundle():
    sections = [line for line in loading_code().splitlines() if line.startswith("# From ")]
    assert sorted(sections) == sorted(f"# From {name}:" for name in MODULES)


def test_no_name_is_bound_twice():
    assert [name for name, count in Counter(defined(TREE)).items() if count > 1] == []


def test_it_needs_torch_and_transformers_only():
    names = {
        name.split(".")[0]
        for node in ast.walk(TREE)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [node.names[0].name])
    }
    assert names - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_it_is_the_same_in_every_process():
    code = "import sys, hf_lowrank.format.bundle as b; sys.stdout.write(b.loading_code())"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert again.stdout == loading_code()


def test_it_registers_where_the_package_cannot_be_imported(tmp_path):
    (tmp_path / "modeling_lowrank.py").write_text(loading_code(), "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "modeling_lowrank"), done.stderr
