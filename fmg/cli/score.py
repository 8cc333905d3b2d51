"""`fmg score`: rewards and metrics of existing images."""

from __future__ import annotations

from typing import Annotated

import typer

from fmg.cli import completion
from fmg.cli.options import AsJson, Device, Features, OptionsByName, reward_options
from fmg.cli.output import print_cells, print_json, stderr, stdout
from fmg.core.display import counted
from fmg.progress.reporters import LOADING, reporter_for


def score(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH", help="Images, folders of images, or folders in GenEval's layout.", show_default=False
        ),
    ],
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N",
            help="Reward; repeat for several.",
            show_default=False,
            autocompletion=completion.components("reward"),
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="PROMPT", help="Prompt of every image.", show_default="from metadata.jsonl")
    ] = None,
    features: Features = None,
    reference: Annotated[
        str | None, typer.Option(metavar="DIR", help="Real images to compare with.", show_default=False)
    ] = None,
    sets: OptionsByName = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score existing images, from any generator."""
    options = reward_options(sets or ())

    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.eval.results import headline_tags, metric_cells, score_cells, tag_cells
        from fmg.eval.score import score as run_scoring

        found = run_scoring(
            paths,
            rewards=reward or (),
            prompt=prompt,
            options=options,
            extractors=features or (),
            reference=reference,
            device=device,
            observer=reporter,
        )
    if as_json:
        print_json(found.to_json())
        return
    out = stdout()
    out.print(f"{counted(len(found.images), 'image')}\n")
    tables = (
        score_cells(found.results),
        tag_cells(headline_tags(found.results, found.tags)),
        metric_cells(found.metrics),
    )
    print_cells(out, *(cells.without_steps() for cells in tables))
