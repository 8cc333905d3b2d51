"""`fmg pretrain`: trains the embedded models from random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from fmg.cli.options import checked_folder
from fmg.cli.output import stderr, stdout
from fmg.core.display import counted
from fmg.progress.reporters import reporter_for

pretrain = typer.Typer(help="Train the models that ship with fmg from random weights.", invoke_without_command=True)

Out = Annotated[str, typer.Option("--out", metavar="DIR", help="Where to write; finished stages there are reused.")]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Random seed.")]


@pretrain.callback()
def group(ctx: typer.Context) -> None:
    """Train the models that ship with fmg from random weights."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@pretrain.command("shapes")
def shapes(out: Out = "pretrained/shapes", seed: Seed = 0) -> None:
    """Train meanflow-shapes and scm-shapes from random weights: about 40 minutes on two cores."""
    folder = checked_folder(out, "--out")

    from fmg.worlds.pretrain.pipeline import pretrain as run
    from fmg.worlds.pretrain.settings import SHAPES
    from fmg.worlds.shapes.world import ShapesWorld

    with reporter_for(stderr()) as reporter:
        figures = run(ShapesWorld(), SHAPES, folder, seed, reporter)
    _print(folder, figures)


@pretrain.command("text")
def text(out: Out = "pretrained/text", seed: Seed = 0) -> None:
    """Train meanflow-text from random weights: about 6 minutes on one core. Needs the extra ocr."""
    folder = checked_folder(out, "--out")

    from fmg.rewards.ocr import shipped_model

    shipped_model("fmg pretrain text")

    from fmg.worlds.pretrain.pipeline import pretrain as run
    from fmg.worlds.pretrain.settings import TEXT
    from fmg.worlds.text.world import TextWorld

    with reporter_for(stderr()) as reporter:
        figures = run(TextWorld(), TEXT, folder, seed, reporter)
    _print(folder, figures)


def _print(folder: Path, figures: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
    for model, by_steps in figures.items():
        for steps, measured in by_steps.items():
            scores = "  ".join(f"{part} {value:.3f}" for part, value in measured.items())
            stdout().print(f"{folder / model}, {counted(steps, 'step')}: {scores}", soft_wrap=True)
