"""What the shell offers for a value when Tab is pressed: names, each with a short description. Imports no torch.

A callback runs while a person types, so it reports no errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from fmg.core.errors import FmgError
from fmg.core.prompt import PROMPT_FILE_SUFFIXES
from fmg.version import is_runtime

RECIPES = ("recipe", "recipes")
"""What `fmg list` and `fmg show` take as the kind of a recipe, which is no component."""
Offers = list[tuple[str, str]]
Completer = Callable[[str], Offers]


def _offering(found: Callable[[str], Iterable[tuple[str, str]]]) -> Completer:
    def complete(incomplete: str) -> Offers:
        try:
            offers: dict[str, str] = {}
            for value, about in found(incomplete):
                if value.startswith(incomplete):
                    offers.setdefault(value, about)
            return list(offers.items())
        except (FmgError, OSError):
            return []

    # Typer chooses the arguments by the names of the parameters; tracebacks name the function
    complete.__name__ = found.__name__
    return complete


def components(kind: str) -> Completer:
    """Names of the components of a kind."""

    def names(incomplete: str) -> Iterator[tuple[str, str]]:
        yield from _components(kind)

    return _offering(names)


def one_of(*words: str) -> Completer:
    """A fixed list of words."""

    def names(incomplete: str) -> Iterator[tuple[str, str]]:
        yield from ((word, "") for word in words)

    return _offering(names)


def _components(kind: str) -> Iterator[tuple[str, str]]:
    from fmg.registry.catalog import registry_for

    registry = registry_for(kind)
    yield from ((name, registry.row(name).summary) for name in registry.names())


@_offering
def kinds(incomplete: str) -> Iterator[tuple[str, str]]:
    """Kinds of components, and recipes."""
    from fmg.registry.catalog import REGISTRIES

    yield from ((registry.plural, "") for registry in REGISTRIES)
    yield "recipes", "shipped runs"


@_offering
def kinds_and_names(incomplete: str) -> Iterator[tuple[str, str]]:
    """Kinds of components, the components themselves, and recipes."""
    from fmg.registry.catalog import REGISTRIES

    yield from ((registry.plural, "") for registry in REGISTRIES)
    for registry in REGISTRIES:
        yield from _components(registry.kind)
    if not is_runtime():
        from fmg.recipe import recipe_names, recipe_summary

        yield "recipes", "shipped runs"
        yield from ((name, recipe_summary(name)) for name in recipe_names())


def names_of_kind(ctx: typer.Context, incomplete: str) -> Offers:
    """Components of the kind given earlier on the command line, or recipes."""
    kind = str(ctx.params.get("kind") or "")
    return recipes(incomplete) if kind in RECIPES else components(kind)(incomplete)


@_offering
def recipes(incomplete: str) -> Iterator[tuple[str, str]]:
    """Shipped recipes, and YAML files."""
    from fmg.recipe import recipe_names, recipe_summary

    yield from ((name, recipe_summary(name)) for name in recipe_names())
    yield from _paths(incomplete, lambda path: path.suffix in (".yaml", ".yml"))


@_offering
def runs(incomplete: str) -> Iterator[tuple[str, str]]:
    """Run folders."""
    from fmg.data.run_folder import is_run, run_names

    yield from ((name, "run") for name in run_names())
    yield from _paths(incomplete, is_run)


@_offering
def artifacts(incomplete: str) -> Iterator[tuple[str, str]]:
    """Exported artifacts."""
    from fmg.inference.artifact.layout import artifact_names, is_artifact

    yield from ((name, "artifact") for name in artifact_names())
    yield from _paths(incomplete, is_artifact)


@_offering
def targets(incomplete: str) -> Iterator[tuple[str, str]]:
    """Models, runs and artifacts."""
    from fmg.data.run_folder import is_run, run_names
    from fmg.inference.artifact.layout import artifact_names, is_artifact

    yield from _components("model")
    yield from ((name, "run") for name in run_names())
    yield from ((name, "artifact") for name in artifact_names())
    yield from _paths(incomplete, lambda path: is_run(path) or is_artifact(path))


@_offering
def other_targets(incomplete: str) -> Iterator[tuple[str, str]]:
    """The other target of a comparison."""
    yield "base", "the same model without its adapter"
    yield from targets(incomplete)


@_offering
def prompt_sets(incomplete: str) -> Iterator[tuple[str, str]]:
    """Prompt sets, and files of prompts."""
    yield from _components("prompt-set")
    yield from _paths(incomplete, lambda path: path.suffix in PROMPT_FILE_SUFFIXES)


@_offering
def grids(incomplete: str) -> Iterator[tuple[str, str]]:
    """Time grids."""
    from fmg.flow.grids import named_grids

    yield from ((name, "") for name in named_grids())


@_offering
def recipe_values(incomplete: str) -> Iterator[tuple[str, str]]:
    """`path=` of every value of the default recipe."""
    from fmg.recipe import Recipe

    notes = Recipe.default().notes()
    yield from ((f"{path}=", note) for path, note in notes.items())


def _paths(incomplete: str, wanted: Callable[[Path], Any]) -> Iterator[tuple[str, str]]:
    """Files and folders whose names begin with what was typed; a folder ends in a slash."""
    folder, slash, begun = incomplete.rpartition("/")
    place = Path(f"{folder}{slash}" or ".")
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path.name.startswith(begun) and not path.name.startswith("."):
            name = f"{folder}{slash}{path.name}"
            if wanted(path):
                yield name, ""
            elif slash and path.is_dir():
                yield f"{name}/", ""
