"""No module of the package imports itself through others, not even inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import below a node, except for those that only a type checker follows."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not is_type_checking(node):
            yield from imports(node)


def imported(node: ast.Import | ast.ImportFrom, modules: frozenset[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif node.module is not None:
        for alias in node.names:
            # `from package import module`, or a name of the module itself
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in modules else node.module


def test_no_import_cycle() -> None:
    trees = {module_name(file): ast.parse(file.read_text()) for file in (ROOT / "fmg").rglob("*.py")}
    modules = frozenset(trees)
    graph = {
        name: {
            found for node in imports(tree) for found in imported(node, modules) if found in modules and found != name
        }
        for name, tree in trees.items()
    }
    assert len(graph) > 100
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' <- '.join(error.args[1])}") from None
