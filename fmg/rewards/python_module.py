"""Where the module of a user's own reward is, without running any of its code. Imports no torch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from fmg.core.errors import UsageError, reason

SIGNATURE = "fn(images, prompts) -> (b,)"


def check_module(target: str) -> None:
    """Whether the module of `module:function` is in the working directory or can be imported from elsewhere, and
    defines the function, as far as its text tells.

    Raises:
        UsageError: when the module is nowhere, is no Python, or has no such name.
    """
    name, _, attribute = target.partition(":")
    parts = name.split(".")
    # importlib.util.find_spec would import the packages around the module, which is code of the user's already
    spec = PathFinder.find_spec(parts[0], [str(Path.cwd())]) or _spec(parts[0], None)
    for count in range(2, len(parts) + 1):
        inside = None if spec is None else spec.submodule_search_locations
        spec = None if inside is None else _spec(".".join(parts[:count]), inside)
    if spec is None:
        raise no_module(target)
    first = attribute.partition(".")[0]
    # what is imported already is what a run would get
    known = vars(sys.modules[name]).keys() if name in sys.modules else _names(spec)
    if known is not None and first not in known:
        raise lacks_function(name, first)


def lacks_function(module: str, attribute: str) -> UsageError:
    """The error that says what a module lacks."""
    return UsageError(f"The module '{module}' has no function '{attribute}'", f"Define {SIGNATURE} under that name.")


def _names(spec: ModuleSpec) -> set[str] | None:
    """Names that a module may have by its text; None where only running it would tell.

    Raises:
        UsageError: the text is no Python.
    """
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    file = Path(spec.origin)
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        where = file.name if line is None else f"{file.name}:{line}"
        raise UsageError(
            f"The module '{spec.name}' cannot be imported at {where}: {type(error).__name__}: {reason(error)}",
            "Correct it.",
        ) from None
    except OSError:
        return None
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    # they can make any name
    return None if names & {"*", "__getattr__", "globals", "exec", "setattr", "vars"} else names


def no_module(target: str) -> UsageError:
    """The error that says where the module of `module:function` was looked for."""
    return UsageError(
        f"There is no module '{target.partition(':')[0]}' for the reward '{target}'",
        f"Run in the folder that holds it ('{Path.cwd()}' was searched first), or install it.",
    )


def _spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    found = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((spec for spec in found if spec is not None), None)
