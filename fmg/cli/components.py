"""`fmg list`, `show`, `init`, `schema` and `check-component`: components, recipes, and checks of extensions.

Only `check-component` imports torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmg.cli import completion
from fmg.cli.options import AsJson, reward_options
from fmg.cli.output import print_json, stdout, table
from fmg.core.errors import FmgError, UsageError, writing
from fmg.version import is_runtime

if TYPE_CHECKING:
    from fmg.registry import Description
    from fmg.registry.config import About
    from fmg.registry.registry import FieldInfo

_KINDS = (
    "models, stochasticizers, rewards, objectives, optimizers, prompt-sets, backends, feature-extractors or trackers"
)

_RECIPE_FILE = "recipe.yaml"
_RECIPE_HEAD = """# The recipe of `fmg train --config {file}`, copied from {source}.
# Change what you like, and delete what you do not change: the model's own recipe supplies the rest.
# `fmg train --config {file} --dry-run` shows what the run needs; `fmg list` and `fmg show NAME` describe components.
# For completion in an editor, run `fmg schema > recipe.schema.json` beside this file, and make this its first line:
#   `# yaml-language-server: $schema=recipe.schema.json`

"""
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def list_components(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND",
            help=f"{_KINDS}; or recipes.",
            show_default="all kinds of components",
            autocompletion=completion.kinds,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the components that recipes and commands can name, or the recipes that ship with fmg."""
    if kind is not None and kind.strip().lower() in completion.RECIPES:
        from fmg.recipe import recipe_names, recipe_summary

        found = [("recipe", name, recipe_summary(name)) for name in recipe_names()]
    else:
        from fmg.registry.catalog import REGISTRIES, registry_for

        chosen = REGISTRIES if kind is None else (registry_for(kind),)
        rows = [registry.row(name) for registry in chosen for name in registry.names()]
        found = [(row.kind, row.name, row.summary) for row in rows]
    gradients = {name for kind_, name, _ in found if kind_ == "reward" and _differentiable(name)}
    if as_json:
        print_json(
            [
                {"kind": kind_, "name": name, "summary": summary}
                | ({"differentiable": name in gradients} if kind_ == "reward" else {})
                for kind_, name, summary in found
            ]
        )
        return
    found = [(kind_, name, f"{text}; differentiable" if name in gradients else text) for kind_, name, text in found]
    stdout().print(table(["kind", "name", "what it is"], found))


def show(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND|NAME",
            help="A name from `fmg list`, or a recipe; put its kind before it if two kinds share the name.",
            show_default=False,
            autocompletion=completion.kinds_and_names,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="The name, after a kind.", show_default=False, autocompletion=completion.names_of_kind
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show one component: what it does, and its options with type, default and range; or every value of a recipe."""
    from fmg.registry.catalog import REGISTRIES, registry_for, registry_of

    if kind.strip().lower() in completion.RECIPES:
        if not name:
            raise UsageError(f"'{kind}' is not the name of a recipe", "Add a name; `fmg list recipes` prints them.")
        _show_recipe(name, as_json=as_json)
        return
    if name is None and all(kind not in registry.names() for registry in REGISTRIES) and _is_recipe(kind):
        _show_recipe(kind, as_json=as_json)
        return
    registry, name = (registry_of(kind), kind) if name is None else (registry_for(kind), name)
    description, config = registry.describe(name), registry.config_class(name)
    ranges, facts = _ranges(config.model_json_schema()), _facts(description)
    if as_json:
        print_json(_plain(description, ranges) | asdict(config.about) | ({"facts": facts} if facts else {}))
        return
    out = stdout()
    out.print(f"{description.kind} {description.name}: {description.summary}\n")
    if description.doc:
        out.print(f"{description.doc}\n")
    origin = list(_origin(config.about))
    if origin:
        out.print("\n".join(origin), end="\n\n", soft_wrap=True)
    if facts:
        out.print("\n".join(f"{name}: {fact}" for name, fact in facts.items()), end="\n\n", soft_wrap=True)
    if not description.fields:
        out.print("No options.")
        return
    cells = [
        (
            field.name,
            field.type,
            "required" if field.required else str(field.default),
            ranges.get(field.name, ""),
            field.doc,
        )
        for field in _options(description.fields)
    ]
    out.print(table(["option", "type", "default", "range", "meaning"], cells))


def _is_recipe(name: str) -> bool:
    if is_runtime():
        return False
    from fmg.recipe import recipe_names

    return name in recipe_names()


def _show_recipe(name: str, *, as_json: bool) -> None:
    """Every value of a recipe, with its source as a comment. Nothing that it names is run."""
    from fmg.recipe import recipe_of

    found = recipe_of(name, allow_code=True)
    if as_json:
        print_json(found.recipe.plain())
    else:
        stdout().print(found.to_yaml(), end="", soft_wrap=True)


def _differentiable(reward: str) -> bool:
    """Whether the objective `reward-gradient` accepts a reward; False if its package cannot be imported."""
    from fmg.registry.catalog import rewards

    try:
        return rewards.config_class(reward).differentiable
    except FmgError:
        return False


def _facts(description: Description) -> dict[str, str]:
    """How a model of the catalog is sampled by its default recipe, and whether a reward has a gradient."""
    if description.kind == "reward":
        unless = ", unless its option gradient says so" if description.name == "python" else ""
        return {"differentiable": "yes" if _differentiable(description.name) else f"no{unless}"}
    if description.kind != "model":
        return {}
    from fmg.recipe import Recipe

    try:
        return dict(Recipe.default(description.name).model.config.facts())
    except FmgError:
        # a model of another package may have no recipe, or one that needs options
        return {}


def _origin(about: About) -> Iterator[str]:
    if about.licence:
        yield f"licence: {about.licence}"
    if about.citation:
        yield f"citation: {about.citation}"
    yield from (f"weights: {line}" for line in about.weights)


def _plain(description: Description, ranges: Mapping[str, str]) -> dict[str, object]:
    from pydantic_core import to_jsonable_python

    options = [
        {
            "name": field.name,
            "type": field.type,
            "default": to_jsonable_python(field.default),
            "required": field.required,
            "range": ranges.get(field.name, ""),
            "doc": field.doc,
        }
        for field in _options(description.fields)
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


def _options(fields: Iterable[FieldInfo]) -> Iterator[FieldInfo]:
    """The options of a component, each section followed by those in it."""
    for field in fields:
        yield field
        yield from _options(field.fields)


def _ranges(schema: Mapping[str, Any]) -> dict[str, str]:
    """The ranges of a config's options by name, those of a section as `section.option`.

    A section that has a short form may not state its options in the schema.
    """
    found: dict[str, str] = {}
    sections = schema.get("$defs", {})

    def add(properties: Mapping[str, Any], prefix: str) -> None:
        for name, entry in properties.items():
            found[prefix + name] = _range(entry)
            for branch in entry.get("anyOf", [entry]):
                section = sections.get(branch.get("$ref", "").rpartition("/")[2], {})
                add(section.get("properties", {}), f"{prefix}{name}.")

    add(schema.get("properties", {}), "")
    return found


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


def init(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="Recipe to start from, by name or file; or a model.",
            show_default="meanflow-shapes",
            autocompletion=completion.recipes,
        ),
    ] = None,
    out: Annotated[str, typer.Option(metavar="FILE", help="Where to write; nothing is overwritten.")] = _RECIPE_FILE,
    as_json: AsJson = False,
) -> None:
    """Write a recipe to edit, with the meaning of each value as a comment."""
    from fmg.recipe import recipe_of
    from fmg.recipe.document import render

    start = recipe_of(recipe, allow_code=True).recipe
    path = Path(out)
    head = _RECIPE_HEAD.format(
        file=shlex.quote(str(path)), source=recipe or f"the default recipe of {start.model.name}"
    )
    text = head + render(start.plain(), start.notes())
    with writing(path, called="--out "):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise UsageError(f"--out {path} exists already", "Name another file; nothing is overwritten.") from None
    if as_json:
        print_json({"recipe": str(path)})
        return
    console = stdout()
    console.print(f"Recipe: {path}", soft_wrap=True)
    console.print(f"\nNext:\n  fmg train --config {shlex.quote(str(path))} --dry-run", soft_wrap=True)


def schema(
    built_in: Annotated[
        bool, typer.Option("--built-in", help="Leave out the components of other packages.", show_default=False)
    ] = False,
) -> None:
    """Print the JSON schema of a recipe, which lets editors complete and check recipe files.

    It covers the components of all installed packages: fmg schema > recipe.schema.json
    """
    from fmg.recipe import schema as of_recipes

    print_json(of_recipes.recipe_schema(of_recipes.built_in if built_in else of_recipes.installed))


def check_component(
    target: Annotated[str, typer.Argument(metavar="PATH|KIND", help="my_pkg:MyReward, or a kind.", show_default=False)],
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A name that `fmg list KIND` prints.", show_default=False)
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="OPTION=VALUE", help="Option of the component; repeat for several.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a component follows the rules of its kind: a reward, a stochasticizer, an objective, ...

    The exit code is 1 when a rule is broken. Imports the module that is named, which runs its code.
    """
    options = reward_options([f"options.{text}" for text in sets or ()]).get("options", {})

    from fmg.conformance import check_component as check

    report = check(target, name, options)
    if as_json:
        print_json(asdict(report))
    else:
        out = stdout()
        out.print(f"{report.kind} {report.name} ({report.factory})\n", soft_wrap=True)
        out.print(table(["rule", "verdict", ""], [(f.rule, f.outcome, f.text) for f in report.findings]))
        broken = len(report.violations)
        out.print(f"\n{broken} of {len(report.findings)} rules broken." if broken else "\nNo rule is broken.")
    if report.violations:
        raise typer.Exit(1)
