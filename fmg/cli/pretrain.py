"""`fmg pretrain`: remakes the embedded models from nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from fmg.cli.console import stderr, stdout
from fmg.cli.observers import reporter_for
from fmg.cli.options import checked_folder

pretrain = typer.Typer(help="Remake the weights that ship with fmg.", invoke_without_command=True)


@pretrain.callback()
def group(ctx: typer.Context) -> None:
    """Remake the weights that ship with fmg."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@pretrain.command("shapes")
def shapes(
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Where to write; a finished stage there is reused.")
    ] = "pretrained/shapes",
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of everything.")] = 0,
) -> None:
    """Train meanflow-shapes and scm-shapes from random weights: about 40 minutes on two cores."""
    folder = checked_folder(out, "--out")

    from fmg.worlds.pretrain.pipeline import pretrain_shapes

    with reporter_for(stderr()) as reporter:
        figures = pretrain_shapes(folder, seed, reporter)
    for model, by_steps in figures.items():
        for steps, measured in by_steps.items():
            scores = "  ".join(f"{part} {value:.3f}" for part, value in measured.as_dict().items())
            stdout().print(f"{folder / model}, {steps} steps: {scores}", soft_wrap=True)
