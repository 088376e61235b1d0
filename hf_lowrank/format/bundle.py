"""The file that travels with a checkpoint: this folder's modules, made into one.

It needs torch and transformers and nothing else, so `from_pretrained(folder,
trust_remote_code=True)` works where hf_lowrank is not installed.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
_FORMS = Path(__file__).parent / "forms"
_ROOT = "hf_lowrank.format.quantizer"
_HEADER = '''"""Compressed linear layers, and how transformers rebuilds them from this checkpoint.

Needs torch and transformers and nothing else: `from_pretrained(folder, trust_remote_code=True)`
loads the checkpoint where the hf_lowrank package is not installed. Importing the file registers
the quantization method "lowrank" with transformers, unless hf_lowrank has done so already.

Put together by hf_lowrank from the modules named below; change those, not this copy.
"""
'''
# In place of the function below: the copy copies itself.
_OWN_CODE = '''

def loading_code() -> str:
    """Source of this file."""
    return Path(__file__).read_text("utf-8")
'''


@cache
def loading_code() -> str:
    """Source of `modeling_lowrank.py`, the same for the same version of this package."""
    trees: dict[str, ast.Module] = {}
    for path in sorted(_FORMS.glob("[!_]*.py")):
        _collect(f"hf_lowrank.format.forms.{path.stem}", trees)
    _collect(_ROOT, trees)
    imports: set[str] = set()
    names: dict[str, set[str]] = {}
    for tree in trees.values():
        for node in tree.body:
            if isinstance(node, ast.Import):
                imports |= {f"import {ast.unparse(alias)}" for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not _is_own(node):
                names.setdefault(str(node.module), set()).update(map(ast.unparse, node.names))
    names.pop("__future__")
    imports |= {f"from {module} import {', '.join(sorted(names[module]))}" for module in names}
    start = [_HEADER, "from __future__ import annotations\n", "\n".join(sorted(imports))]
    return "\n".join([*start, *(_body(name, tree) for name, tree in trees.items()), _OWN_CODE])


def _collect(name: str, trees: dict[str, ast.Module]) -> None:
    """Adds a module behind those that it needs; this one stays out."""
    if name in trees or name == __name__:
        return
    tree = ast.parse(_source(name))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and _is_own(node):
            _collect(str(node.module), trees)
    trees[name] = tree


def _body(name: str, tree: ast.Module) -> str:
    """A module's source from behind its last import, or its docstring, to its end."""
    head = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    lines = _source(name).splitlines()[head[-1].end_lineno :]
    return "\n".join(["", "", f"# From {name}:", *lines])


def _is_own(node: ast.ImportFrom) -> bool:
    return str(node.module).startswith("hf_lowrank.")


def _source(name: str) -> str:
    return (_PACKAGE.parent / f"{name.replace('.', '/')}.py").read_text("utf-8")
