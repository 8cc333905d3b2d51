"""Where the module of a user's own reward is, without running any of its code. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from fmg.core.errors import UsageError


def check_module(target: str) -> None:
    """Whether the module of `module:function` is in the working directory or can be imported from elsewhere.

    Raises:
        UsageError: when it is nowhere.
    """
    parts = target.partition(":")[0].split(".")
    # importlib.util.find_spec would import the packages around the module, which is code of the user's already
    spec = PathFinder.find_spec(parts[0], [str(Path.cwd())]) or _spec(parts[0], None)
    for count in range(2, len(parts) + 1):
        inside = None if spec is None else spec.submodule_search_locations
        spec = None if inside is None else _spec(".".join(parts[:count]), inside)
    if spec is None:
        raise no_module(target)


def no_module(target: str) -> UsageError:
    """The error that says where the module of `module:function` was looked for."""
    return UsageError(
        f"There is no module '{target.partition(':')[0]}' for the reward '{target}'",
        f"Run in the folder that holds it ('{Path.cwd()}' was searched first), or install it.",
    )


def _spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    found = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((spec for spec in found if spec is not None), None)
