"""`fmg eval`: scores of one target, or of two with their paired difference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli.console import print_json, stderr, stdout
from fmg.cli.metrics import signed
from fmg.cli.observers import LOADING, reporter_for
from fmg.cli.options import (
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Grid,
    Num,
    Offline,
    Seed,
    check_grid,
    given_text,
    parse_steps,
)
from fmg.cli.tables import change, interval, number, table

if TYPE_CHECKING:
    from rich.table import Table

    from fmg.eval import EvalReport


def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[TARGET]", help="A model or a run folder.", show_default="the newest run"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="T", help="A second target, or base: adds the difference on the same prompts and seeds."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="N|F", help="Prompt set by name, or a .txt or .jsonl file.", show_default="the target's"),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="N", help="Reward to measure; repeat for several.", show_default="the target's"),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(metavar="1,2,4", help="Numbers of network calls to sweep.", show_default="the target's"),
    ] = None,
    grid: Grid = None,
    num: Num = 1000,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    batch_size: BatchSize = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let the recipe of a run name reward code and reward servers.")
    ] = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model or a run with its deterministic few-step sampler."""
    sweep = parse_steps(steps) if steps is not None else None
    check_grid(grid)
    given_text(target, "TARGET")
    given_text(against, "--against")
    given_text(prompts, "--prompts")

    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.eval import evaluate as run_evaluation

        report = run_evaluation(
            target,
            against=against,
            prompts=prompts,
            rewards=reward or None,
            steps=sweep,
            grid=grid,
            num=num,
            seed=seed,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            allow_code=allow_code,
            observer=reporter,
        )
    if as_json:
        print_json(report.to_json())
        return
    out = stdout()
    out.print(f"{report.num} images on {report.prompts}, grid {report.grid}, seed {report.seed}\n")
    if not report.against:
        out.print(_scores(report))
        return
    out.print(_comparison(report))
    out.print()
    for line in _headlines(report):
        out.print(line, soft_wrap=True)


def _scores(report: EvalReport) -> Table:
    rows = [
        (str(row.steps), row.reward, row.part, number(row.mean), interval(row.ci95), number(row.std))
        for row in report.results
    ]
    columns = ["steps", "reward", "part", "mean", "95 % interval", "std"]
    return table(columns, rows, right=["steps", "mean", "95 % interval", "std"])


def _comparison(report: EvalReport) -> Table:
    (other,) = report.against
    rows = []
    for ours, theirs, delta in zip(report.results, other.results, report.differences, strict=True):
        gap = signed(delta.mean)
        rows.append(
            (str(ours.steps), ours.reward, ours.part, number(theirs.mean), number(ours.mean), gap, interval(delta.ci95))
        )
    columns = ["steps", "reward", "part", other.target, report.target, "difference", "95 % interval"]
    return table(columns, rows, right=["steps", other.target, report.target, "difference", "95 % interval"])


def _headlines(report: EvalReport) -> Iterator[str]:
    """The other target's score and ours: strict accuracies, and the total of rewards that have none."""
    (other,) = report.against
    strict = {row.reward for row in report.results if row.part == "strict"}
    for ours, theirs in zip(report.results, other.results, strict=True):
        if ours.part == ("strict" if ours.reward in strict else "total"):
            name = ours.reward if ours.part == "total" else f"{ours.reward} {ours.part}"
            yield f"{name}, {ours.steps} steps: {change(theirs.mean, ours.mean)}"
