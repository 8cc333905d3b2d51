"""`fmg pretrain`: trains the embedded models from random weights, by the tool in `tools/pretraining` of a checkout."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fmg.cli.options import Command, checked_folder
from fmg.cli.output import stderr, stdout
from fmg.core.display import counted
from fmg.core.errors import UsageError
from fmg.progress.reporters import reporter_for

pretrain = typer.Typer(help="Train the models that ship with fmg from random weights.", invoke_without_command=True)

CHECKOUT = Path(__file__).resolve().parents[2]

Out = Annotated[str, typer.Option("--out", metavar="DIR", help="Where to write; finished stages there are reused.")]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Random seed.")]


@pretrain.callback()
def group(ctx: typer.Context) -> None:
    """Train the models that ship with fmg from random weights."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@pretrain.command("shapes", cls=Command)
def shapes(out: Out = "pretrained/shapes", seed: Seed = 0) -> None:
    """Train meanflow-shapes and scm-shapes from random weights: about 40 minutes on two cores."""
    _run("shapes", checked_folder(out, "--out"), seed)


@pretrain.command("text", cls=Command)
def text(out: Out = "pretrained/text", seed: Seed = 0) -> None:
    """Train meanflow-text from random weights: about 6 minutes on one core. Needs the extra ocr."""
    folder = checked_folder(out, "--out")

    from fmg.rewards.ocr import shipped_model

    shipped_model("fmg pretrain text")
    _run("text", folder, seed)


@pretrain.command("shapes-clip", cls=Command)
def shapes_clip(out: Out = "pretrained/shapes-clip", seed: Seed = 0) -> None:
    """Train the reward shapes-clip from random weights: about two minutes on one core."""
    folder = checked_folder(out, "--out")
    scorer = _tool("scorer")
    with reporter_for(stderr()) as reporter:
        figures = scorer.train_scorer(scorer.ScorerSettings(), folder, seed, reporter)
    for images, agreement in figures.items():
        text = f"{folder}, {images}: AUC {agreement.auc:.4f}  accuracy {agreement.accuracy:.3f}"
        stdout().print(text, soft_wrap=True)


def _run(world: str, folder: Path, seed: int) -> None:
    pipeline = _tool("pipeline")
    with reporter_for(stderr()) as reporter:
        figures = pipeline.pretrain(*pipeline.shipped(world), folder, seed, reporter)
    for model, by_steps in figures.items():
        for steps, measured in by_steps.items():
            scores = "  ".join(f"{part} {value:.3f}" for part, value in measured.items())
            stdout().print(f"{folder / model}, {counted(steps, 'step')}: {scores}", soft_wrap=True)


def _tool(module: str) -> Any:
    tools = CHECKOUT / "tools"
    if not (tools / "pretraining").is_dir() or not (CHECKOUT / "pyproject.toml").is_file():
        raise UsageError(
            "Pretraining is not part of the installed package",
            "Run `fmg pretrain` in a checkout of the repository; the tool is in its folder tools/pretraining.",
        )
    sys.path.insert(0, str(tools))
    return importlib.import_module(f"pretraining.{module}")
