"""`fmg init`: a recipe to edit, every value with what it means."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fmg.cli import completion
from fmg.cli.console import print_json, stdout
from fmg.cli.options import AsJson, given_text
from fmg.core.errors import UsageError, writing

_FILE = "recipe.yaml"
_HEAD = """# A run of `fmg train --config {file}`, begun as a copy of {source}.
# Change what you like and delete what you leave as it is: the rest comes from the model's own recipe.
# `fmg train --config {file} --dry-run` says what the run takes; `fmg list` and `fmg show NAME` describe components.

"""


def init(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="Recipe to begin with, by name or file, or a model.",
            show_default="meanflow-shapes",
            autocompletion=completion.recipes,
        ),
    ] = None,
    out: Annotated[str, typer.Option(metavar="FILE", help="Where to write; nothing is overwritten.")] = _FILE,
    as_json: AsJson = False,
) -> None:
    """Write a recipe to edit, with the meaning of every value beside it."""
    given_text(recipe, "RECIPE")
    given_text(out, "--out")

    from fmg.registry.document import render
    from fmg.registry.resolve import recipe_of

    begun = recipe_of(recipe, allow_code=True).recipe
    path = Path(out)
    head = _HEAD.format(file=shlex.quote(str(path)), source=recipe or f"the default recipe of {begun.model.name}")
    text = head + render(begun.plain(), begun.notes())
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
