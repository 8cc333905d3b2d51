"""`fmg score`: rewards and metrics of existing images."""

from __future__ import annotations

from typing import Annotated

import typer

from fmg.cli import completion
from fmg.cli.options import AsJson, Device, Features, OptionsByName, given_text, reward_options
from fmg.cli.output import compact, interval, number, print_json, stderr, stdout, table
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
        str | None, typer.Option(metavar="TEXT", help="Prompt of every image.", show_default="from metadata.jsonl")
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
    for path in paths:
        given_text(path, "PATH")
    given_text(reference, "--reference")
    options = reward_options(sets or ())

    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.eval.results import headline_tags
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
    if found.results:
        rows = [(r.reward, r.part, number(r.mean), interval(r.ci95), number(r.std)) for r in found.results]
        columns = ["reward", "part", "mean", "95 % interval", "std"]
        out.print(table(columns, rows, right=columns[2:]))
    if found.tags:
        out.print()
        chosen = headline_tags(found.results, found.tags)
        tags = [(t.reward, t.part, t.tag, str(t.num), number(t.mean), interval(t.ci95)) for t in chosen]
        columns = ["reward", "part", "tag", "images", "mean", "95 % interval"]
        out.print(table(columns, tags, right=columns[3:]))
    if found.metrics:
        out.print()
        metrics = [(m.extractor, m.metric, compact(m.value), interval(m.ci95, compact)) for m in found.metrics]
        columns = ["features", "metric", "value", "95 % interval"]
        out.print(table(columns, metrics, right=columns[2:]))
