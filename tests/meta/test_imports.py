"""No module of the package imports itself through others, not even inside a function; the runtime is complete."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST, *, in_functions: bool = True) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import below a node, except for those that only a type checker follows."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not is_type_checking(node) and (in_functions or not isinstance(node, ast.FunctionDef)):
            yield from imports(node, in_functions=in_functions)


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


RUNTIME = {"PIL", "filelock", "numpy", "onnxruntime", "rich", "tokenizers", "typer"}
"""What the dependencies of the runtime install, without its extra `server`."""
SERVER = {"fastapi", "prometheus_client", "pydantic", "pydantic_core", "starlette", "uvicorn"}


def packaged() -> frozenset[Path]:
    """The modules that the runtime consists of."""
    build = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]
    listed = [ROOT / name for name in (*build["only-include"], *build["exclude"])]
    assert not [path for path in listed if not path.exists()]
    places = [ROOT / name for name in build["only-include"]]
    included = {file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])}
    return frozenset(file for file in included if file.suffix == ".py") - {ROOT / name for name in build["exclude"]}


def test_the_runtime_imports_only_what_it_has() -> None:
    files = {module_name(file): file for file in packaged()}
    everything = frozenset(module_name(file) for file in (ROOT / "fmg").rglob("*.py"))
    assert len(files) > 60
    missing = []
    for name, file in files.items():
        # configs of components, and the servers
        extra = name.startswith(("fmg.registry", "fmg.serving", "fmg.inference.service", "fmg.inference.configs"))
        for node in imports(ast.parse(file.read_text()), in_functions=False):
            for found in imported(node, everything):
                package = found.partition(".")[0]
                known = package in sys.stdlib_module_names or package in RUNTIME or (extra and package in SERVER)
                if found not in files and not known:
                    missing.append(f"{name}: {found}")
    assert not missing
