"""`fmg list` and `fmg show`: what there is to choose from. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmg.cli import completion
from fmg.cli.console import print_json, stdout
from fmg.cli.options import AsJson
from fmg.cli.tables import table

if TYPE_CHECKING:
    from fmg.registry import Description
    from fmg.registry.config import About

_KINDS = "models, stochasticizers, rewards, objectives, optimizers, prompt-sets, backends or feature-extractors"
_RECIPES = ("recipe", "recipes")

_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def list_components(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]",
            help=f"{_KINDS}; or recipes.",
            show_default="all kinds of components",
            autocompletion=completion.kinds,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the components that recipes and commands can name, or the recipes that ship with fmg."""
    if kind is not None and kind.strip().lower() in _RECIPES:
        from fmg.registry.paths import recipe_names, recipe_summary

        found = [("recipe", name, recipe_summary(name)) for name in recipe_names()]
    else:
        from fmg.registry.kinds import REGISTRIES, registry_for

        chosen = REGISTRIES if kind is None else (registry_for(kind),)
        rows = [registry.row(name) for registry in chosen for name in registry.names()]
        found = [(row.kind, row.name, row.summary) for row in rows]
    if as_json:
        print_json([dict(zip(("kind", "name", "summary"), entry, strict=True)) for entry in found])
        return
    stdout().print(table(["kind", "name", "what it is"], found))


def show(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="[KIND]",
            help=f"{_KINDS}; only where two kinds have the name.",
            show_default=False,
            autocompletion=completion.kinds_and_names,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A name that `fmg list` prints.",
            show_default=False,
            autocompletion=completion.names_of_kind,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show one component: what it does, and its options with type, default and range."""
    from fmg.registry.kinds import registry_for, registry_of

    registry, name = (registry_of(kind), kind) if name is None else (registry_for(kind), name)
    description, config = registry.describe(name), registry.config_class(name)
    ranges = _ranges(config.model_json_schema())
    if as_json:
        print_json(_plain(description, ranges) | asdict(config.about))
        return
    out = stdout()
    out.print(f"{description.kind} {description.name}: {description.summary}\n")
    if description.doc:
        out.print(f"{description.doc}\n")
    origin = list(_origin(config.about))
    if origin:
        out.print("\n".join(origin), end="\n\n", soft_wrap=True)
    if not description.fields:
        out.print("It has no options.")
        return
    cells = [
        (field.name, field.type, "required" if field.required else str(field.default), ranges[field.name], field.doc)
        for field in description.fields
    ]
    out.print(table(["option", "type", "default", "range", "meaning"], cells))


def _origin(about: About) -> Iterator[str]:
    if about.licence:
        yield f"licence: {about.licence}"
    if about.citation:
        yield f"to cite: {about.citation}"
    yield from (f"weights: {line}" for line in about.weights)


def _plain(description: Description, ranges: Mapping[str, str]) -> dict[str, object]:
    from pydantic_core import to_jsonable_python

    options = [
        {
            "name": field.name,
            "type": field.type,
            "default": to_jsonable_python(field.default),
            "required": field.required,
            "range": ranges[field.name],
            "doc": field.doc,
        }
        for field in description.fields
    ]
    return {
        "kind": description.kind,
        "name": description.name,
        "summary": description.summary,
        "doc": description.doc,
        "config": description.config,
        "factory": description.factory,
        "options": options,
    }


def _ranges(schema: Mapping[str, Any]) -> dict[str, str]:
    """What each option accepts, from the JSON schema of its config class."""
    return {name: _range(entry) for name, entry in schema.get("properties", {}).items()}


def _range(entry: Mapping[str, Any]) -> str:
    branches = [branch for branch in entry.get("anyOf", [entry]) if branch.get("type") != "null"]
    parts = []
    for branch in branches:
        parts += [f"{sign} {branch[key]:g}" for key, sign in _BOUNDS.items() if key in branch]
        if "enum" in branch:
            parts.append(", ".join(map(str, branch["enum"])))
        if "pattern" in branch:
            parts.append(branch["pattern"])
    return " and ".join(parts)
