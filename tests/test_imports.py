"""The one-way flow: who imports whom, and who may edit a model. Read from the source with ast."""

import ast
from pathlib import Path

import pytest

import hf_lowrank

PACKAGE = Path(hf_lowrank.__file__).parent
# The house from the ground up: a unit may import those in front of it, never one behind.
ORDER = (
    "version",
    "errors",
    "files",
    "format",
    "serving",
    "value_checks",
    "config",
    "decomposition",
    "ranks",
    "channels",
    "measuring",
    "modeling",
    "report",
    "inputs",
    "evaluation",
    "compression",
    "hf_lowrank",
    "training",
    "pruning",
    "tasks",
    "cli",
)
MATHS = ("decomposition", "ranks")
MODEL_EDITORS = {"format", "modeling"}
# The one exception: other forward passes for a while, where blocks or a body are not run.
FORWARD_REPLACERS = {
    "hf_lowrank.compression.streaming.block_stream",
    "hf_lowrank.measuring.projection",
}
MODULE_LISTS = {"_modules", "blocks", "experts", "layers", "list"}
MOST_FLOORS = 12
MOST_LOOSE_MODULES = 8


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in SOURCES.items()}


def imports(name: str) -> set[str]:
    """Absolute names of everything that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: line {node.lineno} is a relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {item if item in SOURCES else str(node.module) for item in full}
    return found


def internal(name: str) -> set[str]:
    return {item for item in imports(name) if item.split(".")[0] == "hf_lowrank"}


def unit(name: str) -> str:
    """The file or folder directly below the package that a module belongs to."""
    return name.split(".")[1] if "." in name else name


def units() -> dict[str, set[str]]:
    """Every unit of the package with the units that it imports."""
    graph: dict[str, set[str]] = {}
    for name in SOURCES:
        graph.setdefault(unit(name), set()).update({unit(item) for item in internal(name)})
    return {name: targets - {name} for name, targets in graph.items()}


def floor(name: str, graph: dict[str, set[str]]) -> int:
    """How many units stand on each other below this one, itself counted."""
    return 1 + max((floor(below, graph) for below in graph[name]), default=0)


def test_there_is_something_to_check():
    assert {"hf_lowrank.modeling.surgery", "hf_lowrank.decomposition.spectrum"} <= set(SOURCES)
    assert "hf_lowrank.config" in internal("hf_lowrank.modeling.targets")
    assert "transformers" in imports("hf_lowrank.format.native_classes") - {""}


def test_every_unit_has_its_place():
    assert sorted(units()) == sorted(ORDER)


def test_floors_are_counted_from_the_ground():
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}
    assert [floor(name, graph) for name in "abcd"] == [3, 2, 1, 1]


def test_the_house_is_low():
    graph = units()
    # scripts/ and benchmarks/ stand on top of the command line.
    assert max(floor(name, graph) for name in graph) + 2 <= MOST_FLOORS


def test_few_modules_lie_loose_in_the_root():
    loose = [path.name for path in PACKAGE.glob("*.py")]
    assert len(loose) <= MOST_LOOSE_MODULES


def test_a_file_name_stands_once():
    names = [path.name for path in SOURCES.values() if path.name != "__init__.py"]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


@pytest.mark.parametrize("name", SOURCES)
def test_imports_exist(name):
    assert internal(name) <= set(SOURCES)


def test_nothing_imports_the_package_itself():
    importers = [name for name in SOURCES if "hf_lowrank" in imports(name)]
    assert importers == []


def first_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some cycle of a graph as a path, empty if there is none."""
    finished: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        for following in sorted(graph.get(node, ())):
            cycle = visit(following, [*path, node])
            if cycle:
                return cycle
        finished.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def test_a_cycle_would_be_found():
    assert first_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_modules_do_not_import_in_circles():
    assert first_cycle({name: internal(name) - {name} for name in SOURCES}) == []


def test_folders_do_not_import_in_circles():
    assert first_cycle(units()) == []


def test_imports_follow_the_order_of_a_run():
    backward = [
        (name, item)
        for name in SOURCES
        for item in internal(name)
        if ORDER.index(unit(item)) > ORDER.index(unit(name))
    ]
    assert backward == []


@pytest.mark.parametrize("name", [name for name in SOURCES if unit(name) in MATHS])
def test_the_maths_knows_no_models(name):
    allowed = {*MATHS, "errors"}
    assert {unit(item) for item in internal(name)} <= allowed
    assert {item.split(".")[0] for item in imports(name)}.isdisjoint(
        {"transformers", "accelerate", "datasets", "peft"}
    )


def calls_of(name: str, method: str) -> list[int]:
    """Lines of a module that call a method of this name."""
    return [
        node.lineno
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == method
    ]


@pytest.mark.parametrize("method", ["set_submodule", "add_module", "register_module"])
def test_few_files_edit_a_model(method):
    editors = {unit(name) for name in SOURCES if calls_of(name, method)}
    assert editors <= MODEL_EDITORS


def assigned(tree: ast.AST) -> tuple[list[int], list[int]]:
    """Lines that put a module into a list of modules, and those that replace a forward pass."""
    modules, forwards = [], []
    for node in ast.walk(tree):
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Attribute) and target.attr == "forward":
                forwards.append(target.lineno)
            owner = target.value if isinstance(target, ast.Subscript) else None
            if isinstance(owner, ast.Attribute) and owner.attr in MODULE_LISTS:
                modules.append(owner.lineno)
    return modules, forwards


def test_assignments_to_a_model_would_be_found():
    text = "self.list[0] = block\nmodel.layers[i] = x\nlayers[name] = x\nblock.forward = other"
    assert assigned(ast.parse(text)) == ([1, 2], [4])


def test_few_files_assign_to_a_model():
    found = {name: assigned(tree) for name, tree in TREES.items()}
    editors = {unit(name) for name, (modules, _) in found.items() if modules}
    assert editors <= MODEL_EDITORS
    assert {name for name, (_, forwards) in found.items() if forwards} == FORWARD_REPLACERS


def test_surgery_is_where_models_are_edited():
    assert calls_of("hf_lowrank.modeling.surgery", "set_submodule")


def test_public_names_are_sorted_and_exist():
    assert hf_lowrank.__all__ == sorted(hf_lowrank.__all__)
    assert all(hasattr(hf_lowrank, name) for name in hf_lowrank.__all__)
