"""Where the recipes that ship with the package are."""

from __future__ import annotations

import itertools
from pathlib import Path

from fmg.core.errors import UsageError, suggestion

_PACKAGE = Path(__file__).resolve().parent.parent


def configs_folder() -> Path:
    """The folder of shipped recipes: `fmg/configs` in an installed package, `configs/` in a source checkout.

    Raises:
        UsageError: when the installation has neither.
    """
    installed = _PACKAGE / "configs"
    if installed.is_dir():
        return installed
    checkout = _PACKAGE.parent / "configs"
    if checkout.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return checkout
    raise UsageError("The recipes that ship with fmg are missing from this installation", "Install fmg again.")


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in configs_folder().glob("*.yaml"))


def recipe_summary(name: str) -> str:
    """What a shipped recipe is for: the first sentence of its leading comment.

    Raises:
        UsageError: for an unknown name, with a suggestion and the list.
    """
    lines = config_path(name).read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.removeprefix("#").strip() for line in comment).partition(". ")[0].rstrip(".")


def config_path(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        UsageError: for an unknown name, with a suggestion and the list.
    """
    known = recipe_names()
    if name not in known:
        raise UsageError(f"There is no shipped recipe named '{name}'", suggestion(name, known))
    return configs_folder() / f"{name}.yaml"
