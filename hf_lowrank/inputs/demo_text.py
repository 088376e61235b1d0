"""Texts that lie on every machine with this package: enough to try a compression offline.

Three kinds of English, so that a model is never judged on the kind that it was calibrated on alone:
Python's language reference (`pydoc_data`, PSF license), mathematical prose (the docstrings of
networkx, which torch depends on; BSD), and legal prose (the licenses of the dependencies).
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics

from hf_lowrank.errors import DataError
from hf_lowrank.value_checks import check_choice

DEMO, DEMO_GRAPHS, DEMO_LICENSES = "demo", "demo-graphs", "demo-licenses"
ROLES = ("calibration", "held_out", "evaluation")
# Half of the pieces for calibration, a quarter held out, a quarter for evaluation.
_PLACES = {"calibration": (0, 2), "held_out": (1,), "evaluation": (3,)}
_LICENSED = ("torch", "numpy", "pyarrow", "pandas", "transformers", "datasets", "regex")
_LEAST = 200  # characters of a paragraph of prose
_LICENSE_FILE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING)[^/]*$")
_NO_PROSE = re.compile(r"[^A-Za-z ,.;:'()-]")


def built_in_text(name: str, role: str) -> str:
    """One of `BUILT_IN`, its part for a role; a paragraph that stands twice has one role alone.

    Args:
        name: Which text.
        role: "calibration", "held_out" or "evaluation".

    Raises:
        ConfigError: There is no such role.
        DataError: The package that the text is from is not installed.
    """
    check_choice("role", role, ROLES)
    pieces = BUILT_IN[name]()
    seen: set[str] = set()
    for each, wanted in _PLACES.items():
        chosen = [piece for i, piece in enumerate(pieces) if i % 4 in wanted]
        paragraphs = [part for piece in chosen for part in piece.split("\n\n")]
        own = [part for part in paragraphs if " ".join(part.split()) not in seen]
        if each == role:
            break
        seen |= {" ".join(part.split()) for part in own}
    return "\n\n".join(own)


@cache
def _topics() -> Sequence[str]:
    return [topics[name] for name in sorted(topics)]


@cache
def _docstrings() -> Sequence[str]:
    """Paragraphs of prose in the docstrings of networkx, by module."""
    spec = importlib.util.find_spec("networkx")
    if spec is None or spec.origin is None:
        raise DataError(f"{DEMO_GRAPHS}: needs networkx, which comes with torch; install it.")
    folder = Path(spec.origin).parent
    files = (path for path in sorted(folder.rglob("*.py")) if "tests" not in path.parts)
    return ["\n\n".join(found) for path in files if (found := list(_prose_of(path)))]


def _prose_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            for part in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(part.split())
                if len(text) >= _LEAST and len(_NO_PROSE.findall(text)) < len(text) / 20:
                    yield text


@cache
def _licenses() -> Sequence[str]:
    """Paragraphs of the licenses of the installed dependencies, each once."""
    found: dict[str, str] = {}
    for name in _LICENSED:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        for file in sorted(files, key=str):
            if _LICENSE_FILE.search(str(file)):
                for part in file.read_text("utf-8").split("\n\n"):
                    if len(part) >= _LEAST:
                        found.setdefault(" ".join(part.split()).lower(), part)
    if not found:
        raise DataError(f"{DEMO_LICENSES}: no dependency is installed with its license.")
    return list(found.values())


BUILT_IN: dict[str, Callable[[], Sequence[str]]] = {
    DEMO: _topics,
    DEMO_GRAPHS: _docstrings,
    DEMO_LICENSES: _licenses,
}
