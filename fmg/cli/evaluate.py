"""`fmg eval`: scores of one target, or of two with their paired difference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli import completion
from fmg.cli.console import print_json, stderr, stdout
from fmg.cli.options import (
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Features,
    Grid,
    Num,
    Offline,
    OptionsByName,
    Seed,
    check_grid,
    given_text,
    new_place,
    parse_steps,
)
from fmg.cli.path_check import path_check as check_path
from fmg.cli.reward_options import reward_options
from fmg.cli.tables import change, compact, interval, number, table
from fmg.core.display import counted
from fmg.core.files import check_place
from fmg.progress.figures import signed
from fmg.progress.reporters import LOADING, reporter_for

if TYPE_CHECKING:
    from rich.table import Table

    from fmg.eval.results import EvalReport


def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[TARGET]",
            help="A model or a run folder.",
            show_default="the newest run",
            autocompletion=completion.targets,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="A second target, or base: adds the difference on the same prompts and seeds.",
            rich_help_panel="What is measured",
            autocompletion=completion.other_targets,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="N|F",
            help="Prompt set by name, or a .txt or .jsonl file.",
            show_default="the target's",
            rich_help_panel="What is measured",
            autocompletion=completion.prompt_sets,
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N",
            help="Reward to measure; repeat for several.",
            show_default="the target's",
            rich_help_panel="What is measured",
            autocompletion=completion.components("reward"),
        ),
    ] = None,
    features: Features = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|world",
            help="Real images to compare with: a folder, or true pictures of an embedded world.",
            show_default=False,
            rich_help_panel="What is measured",
        ),
    ] = None,
    sets: OptionsByName = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="1,2,4",
            help="Numbers of network calls to sweep.",
            show_default="the target's",
            rich_help_panel="Sampling",
        ),
    ] = None,
    grid: Grid = None,
    num: Num = 1000,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    batch_size: BatchSize = None,
    dump: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="geneval DIR",
            help="Write the images as GenEval reads them.",
            show_default=False,
            rich_help_panel="Files",
        ),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|F.html",
            help="Write a page with pictures, and its JSON.",
            show_default=False,
            rich_help_panel="Files",
        ),
    ] = None,
    path_check: Annotated[
        str | None,
        typer.Option(
            "--path-check",
            metavar="F",
            help="Instead: which stochasticizers stay on the model's path; a .png, .svg or .pdf, and JSON beside it.",
            show_default=False,
            rich_help_panel="Files",
        ),
    ] = None,
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
    given_text(reference, "--reference")
    if given_text(report, "--report") is not None:
        check_place(Path(str(report)), "--report")
    new_place(dump[1] if dump else None, "--dump")
    if path_check is not None:
        check_path(
            target,
            path_check,
            others={
                "against": against,
                "features": features,
                "reference": reference,
                "set": sets,
                "batch-size": batch_size,
                "dump": dump,
                "report": report,
            },
            prompts=prompts,
            rewards=reward,
            sweep=sweep,
            grid=grid,
            num=num,
            seed=seed,
            device=device,
            dtype=dtype,
            allow_code=allow_code,
            as_json=as_json,
        )
        return
    options = reward_options(sets or ())

    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.eval.evaluate import evaluate as run_evaluation

        found = run_evaluation(
            target,
            against=against,
            prompts=prompts,
            rewards=reward or None,
            options=options,
            extractors=features or (),
            reference=reference,
            steps=sweep,
            grid=grid,
            num=num,
            seed=seed,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            dump=dump,
            report=report,
            allow_code=allow_code,
            observer=reporter,
        )
    if as_json:
        print_json(found.to_json())
        return
    out = stdout()
    out.print(f"{counted(found.num, 'image')} on {found.prompts}, grid {found.grid}, seed {found.seed}\n")
    out.print(_comparison(found) if found.against else _scores(found))
    for extra in (_tags(found), _metrics(found)):
        if extra is not None:
            out.print()
            out.print(extra)
    if found.against:
        out.print()
        for line in _headlines(found):
            out.print(line, soft_wrap=True)
    if dump is not None:
        out.print(f"Images: {dump[1]}", soft_wrap=True)
    if report is not None:
        from fmg.eval.report import report_files

        out.print(f"Report: {report_files(report).html}", soft_wrap=True)


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


def _tags(report: EvalReport) -> Table | None:
    from fmg.eval.results import headline_tags

    rows = [
        (str(row.steps), row.reward, row.part, row.tag, str(row.num), number(row.mean), interval(row.ci95))
        for row in headline_tags(report.results, report.tags)
    ]
    columns = ["steps", "reward", "part", "tag", "images", "mean", "95 % interval"]
    return table(columns, rows, right=["steps", "images", "mean", "95 % interval"]) if rows else None


def _metrics(report: EvalReport) -> Table | None:
    rows: list[tuple[str, ...]] = [
        (str(row.steps), row.extractor, row.metric, compact(row.value), interval(row.ci95, compact))
        for row in report.metrics
    ]
    columns = ["steps", "features", "metric", report.target, "95 % interval"]
    for other in report.against:
        columns += [other.target, "difference", "95 % interval of it"]
        rows = [
            (*row, compact(theirs.value), f"{delta.value:+.3g}", interval(delta.ci95, compact))
            for row, theirs, delta in zip(rows, other.metrics, report.metric_differences, strict=True)
        ]
    return table(columns, rows, right=[*columns[:1], *columns[3:]]) if rows else None


def _headlines(report: EvalReport) -> Iterator[str]:
    """The other target's score and ours: strict accuracies, and the total of rewards that have none."""
    (other,) = report.against
    strict = {row.reward for row in report.results if row.part == "strict"}
    for ours, theirs in zip(report.results, other.results, strict=True):
        if ours.part == ("strict" if ours.reward in strict else "total"):
            name = ours.reward if ours.part == "total" else f"{ours.reward} {ours.part}"
            yield f"{name}, {counted(ours.steps, 'step')}: {change(theirs.mean, ours.mean)}"
