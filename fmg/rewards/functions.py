"""Reward functions of your own: their names in a recipe, and checks of their module that run none of its code.

Imports no torch.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fmg.core.errors import UsageError, WrongTypeError, reason
from fmg.recipe.sections import FUNCTION_REWARD

RewardFunction = Callable[..., Any]
"""`fn(images (b, 3, h, w) in [0, 1], prompts) -> (b,)`: one number for each image, or a `RewardOutput`."""
Reward = str | RewardFunction | Mapping[str, object]
Rewards = Reward | Iterable[Reward] | Mapping[Reward, float]
"""Rewards of a Python call: names, functions, entries of a recipe, or a mapping of names and functions to weights."""
Functions = Mapping[str, RewardFunction]
"""The functions passed to a Python call, by their names in the recipe."""
NO_FUNCTIONS: Functions = MappingProxyType({})

_LISTS = ("rewards", "reward", "eval.rewards")


def split_functions(values: Mapping[str, object]) -> tuple[dict[str, object], Functions]:
    """Values of a recipe in which functions are replaced by references to them, and the functions by name.

    Args:
        values: values by dotted path; `rewards` and `eval.rewards` may contain functions.

    Raises:
        WrongTypeError: a reward has the wrong type.
        UsageError: two functions have the same name.
    """
    functions: dict[str, RewardFunction] = {}
    plain = {path: _entries(value, functions) if path in _LISTS else value for path, value in values.items()}
    return plain, functions


def measured_names(rewards: Rewards | None) -> tuple[list[str | Mapping[str, object]] | None, Functions]:
    """Rewards to measure, as names and entries of a recipe, and the functions among them by name.

    Raises:
        WrongTypeError: a reward has the wrong type.
        UsageError: two functions have the same name.
    """
    if not rewards and not callable(rewards):
        return None, NO_FUNCTIONS
    functions: dict[str, RewardFunction] = {}
    return _entries(rewards, functions), functions


def function_name(function: RewardFunction) -> str:
    """The name of a function in recipe and log: its own, or that of its class, in letters, digits and `_`."""
    name = str(getattr(function, "__name__", type(function).__name__))
    return re.sub(r"\W+", "", name, flags=re.ASCII) or "function"


def no_function(name: str) -> UsageError:
    """The error for a reward that is a function which was not passed."""
    return UsageError(
        f"The reward '{name}' is a Python function, which only a Python program can pass to the run again",
        f"Call it from there: `fmg.resume(run, rewards=[{name}])`, and likewise train and evaluate.",
    )


def _entries(given: object, functions: dict[str, RewardFunction]) -> list[str | Mapping[str, object]]:
    if isinstance(given, Mapping) and "name" not in given:
        return [_entry(reward, functions, weight=weight) for reward, weight in given.items()]
    if isinstance(given, (str, Mapping)) or callable(given):
        return [_entry(given, functions)]
    if not isinstance(given, Iterable):
        raise _wrong(given)
    return [_entry(reward, functions) for reward in given]


def _entry(reward: object, functions: dict[str, RewardFunction], **more: object) -> str | Mapping[str, object]:
    if isinstance(reward, str):
        return {"name": reward, **more} if more else reward
    if isinstance(reward, Mapping):
        return reward
    if not callable(reward):
        raise _wrong(reward)
    name = function_name(reward)
    if functions.setdefault(name, reward) is not reward:
        raise UsageError(f"Two functions are called '{name}'", "Give one of them another name.")
    return {"name": FUNCTION_REWARD, "function": name, **more}


def _wrong(given: object) -> WrongTypeError:
    return WrongTypeError("rewards", given, "names of rewards, functions of images and prompts, or a list of them")


SIGNATURE = "fn(images, prompts) -> (b,)"


def check_module(target: str) -> None:
    """Checks, without running it, that the module of `module:function` can be found and defines the function.

    Raises:
        UsageError: the module is neither in the working directory nor importable, is not Python, or lacks the name.
    """
    name, _, attribute = target.partition(":")
    parts = name.split(".")
    # importlib.util.find_spec would import the packages around the module, which is user code already
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
    """The error for a module without the function."""
    return UsageError(f"The module '{module}' has no function '{attribute}'", f"Define {SIGNATURE} under that name.")


def _names(spec: ModuleSpec) -> set[str] | None:
    """Names that a module may define, according to its source; None if only running it would tell.

    Raises:
        UsageError: the source is not Python.
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
    # such code can define any name
    return None if names & {"*", "__getattr__", "globals", "exec", "setattr", "vars"} else names


def no_module(target: str) -> UsageError:
    """The error for a module that cannot be found; says where it was looked for."""
    return UsageError(
        f"There is no module '{target.partition(':')[0]}' for the reward '{target}'",
        f"Run in the folder that contains it ('{Path.cwd()}' was searched first), or install it.",
    )


def _spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    found = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((spec for spec in found if spec is not None), None)
