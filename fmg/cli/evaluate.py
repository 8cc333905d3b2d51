"""`fmg eval`: scores of one target, or of two with their paired difference; also the path check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmg.cli import completion
from fmg.cli.options import (
    AllowCode,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Features,
    Grid,
    Offline,
    OptionsByName,
    Seed,
    file_option,
    hardware_option,
    measuring_option,
    new_figure,
    new_place,
    parse_steps,
    reward_options,
    sampling_option,
)
from fmg.cli.output import change, print_cells, print_json, stderr, stdout, table
from fmg.core.display import counted, interval, number, signed
from fmg.core.errors import UsageError
from fmg.core.files import check_place
from fmg.core.json_io import write_json
from fmg.progress.reporters import LOADING, reporter_for

if TYPE_CHECKING:
    from fmg.eval.path_check import PathReport
    from fmg.eval.results import EvalReport


def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            help="A model, a run folder, or a run on the hub: owner/name or owner/name@revision.",
            show_default="the newest run",
            autocompletion=completion.targets,
        ),
    ] = None,
    against: Annotated[
        str | None,
        measuring_option(
            metavar="T",
            help="A second target, or base; adds the difference on the same prompts and seeds.",
            autocompletion=completion.other_targets,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        measuring_option(
            metavar="N|F",
            help="Prompt set by name, or a .txt or .jsonl file.",
            show_default="the target's",
            autocompletion=completion.prompt_sets,
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        measuring_option(
            metavar="N",
            help="Reward to measure; repeat for several.",
            show_default="the target's",
            autocompletion=completion.components("reward"),
        ),
    ] = None,
    features: Features = None,
    reference: Annotated[
        str | None,
        measuring_option(
            metavar="DIR|world",
            help="Real images to compare with: a folder, or 'world' for renderings of the embedded world.",
            show_default=False,
        ),
    ] = None,
    sets: OptionsByName = None,
    steps: Annotated[
        str | None,
        sampling_option(metavar="1,2,4", help="Sampling steps (NFE) to evaluate at.", show_default="the target's"),
    ] = None,
    grid: Grid = None,
    resolution: Annotated[
        int | None,
        sampling_option(
            min=8,
            max=16384,
            metavar="N",
            help="Image side in pixels, where a model has several.",
            show_default="the target's",
        ),
    ] = None,
    num: Annotated[int, sampling_option(min=1, max=1_000_000, metavar="N", help="Images per number of steps.")] = 1000,
    seed: Seed = 0,
    backend: Annotated[
        str | None,
        hardware_option(
            "--backend",
            metavar="B",
            help="torch, or torch-compile.",
            show_default="torch",
            autocompletion=completion.one_of("torch", "torch-compile"),
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    batch_size: BatchSize = None,
    dump: Annotated[
        tuple[str, str] | None,
        file_option(metavar="geneval DIR", help="Write the images in GenEval's layout.", show_default=False),
    ] = None,
    report: Annotated[
        str | None,
        file_option(
            metavar="DIR|F.html", help="Write an HTML page with images, and its data as JSON.", show_default=False
        ),
    ] = None,
    path_check: Annotated[
        str | None,
        file_option(
            "--path-check",
            metavar="F",
            help="Instead, test which samplers leave the marginal path; writes a .png, .svg or .pdf, and JSON.",
            show_default=False,
        ),
    ] = None,
    allow_code: AllowCode = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model or a run with its native few-step sampler."""
    sweep = parse_steps(steps) if steps is not None else None
    if report is not None:
        check_place(Path(report), "--report")
    new_place(dump[1] if dump else None, "--dump")
    shared: dict[str, Any] = {
        "prompts": prompts,
        "rewards": reward or None,
        "grid": grid,
        "num": num,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "allow_code": allow_code,
    }
    if path_check is not None:
        others = {
            "against": against,
            "features": features,
            "reference": reference,
            "set": sets,
            "backend": backend,
            "batch-size": batch_size,
            "dump": dump,
            "report": report,
            "resolution": resolution,
        }
        for name, value in others.items():
            if value:
                raise UsageError(f"--{name} cannot be used with --path-check", "Leave out one of them.")
        _path_check(target, path_check, sweep, shared, as_json=as_json)
        return
    options = reward_options(sets or ())

    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.eval.evaluate import evaluate as run_evaluation
        from fmg.eval.results import headline_tags, tag_cells

        found = run_evaluation(
            target,
            **shared,
            against=against,
            options=options,
            extractors=features or (),
            reference=reference,
            steps=sweep,
            resolution=resolution,
            backend=backend or "torch",
            batch_size=batch_size,
            dump=dump,
            report=report,
            observer=reporter,
        )
    if as_json:
        print_json(found.to_json())
        return
    out = stdout()
    out.print(f"{counted(found.num, 'image')} on {found.prompts}, grid {found.grid}, seed {found.seed}\n")
    print_cells(out, found.scores(), tag_cells(headline_tags(found.results, found.tags)), found.set_metrics())
    if found.against:
        out.print()
        for line in _headlines(found):
            out.print(line, soft_wrap=True)
    if dump is not None:
        out.print(f"Images: {dump[1]}", soft_wrap=True)
    if report is not None:
        from fmg.eval.report import report_files

        out.print(f"Report: {report_files(report).html}", soft_wrap=True)


def _path_check(
    target: str | None, out: str, sweep: Sequence[int] | None, shared: Mapping[str, Any], *, as_json: bool
) -> None:
    if sweep is not None and len(sweep) > 1:
        raise UsageError("--path-check takes one number of steps", "Give --steps one number.")
    figure = new_figure(out, "--path-check")
    data = figure.with_suffix(".json")
    new_place(str(data), "--path-check")

    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.eval.path_check import path_check as check
        from fmg.eval.path_check import path_figure

        report = check(target, **shared, steps=sweep[0] if sweep else None, observer=reporter)
        path_figure(report, figure)
        write_json(data, report.to_json())
    if as_json:
        print_json(report.to_json())
    else:
        _print_path(report, figure)


def _print_path(report: PathReport, figure: Path) -> None:
    out = stdout()
    times = ", ".join(f"{time:g}" for time in report.grid)
    out.print(f"{counted(report.num, 'image')} on {report.prompts}, times {times}, seed {report.seed}\n")
    rows = [
        (
            row.stochasticizer,
            f"{row.time:.3g}",
            row.quantity,
            number(row.reference),
            number(row.value),
            signed(row.difference),
            interval(row.ci95),
        )
        for row in report.rows
    ]
    columns = ["stochasticizer", "time", "quantity", "on the path", "its states", "difference", "95 % interval"]
    out.print(table(columns, rows, right=["time", *columns[3:]]))
    out.print(f"\nFigure: {figure}\nData: {figure.with_suffix('.json')}", soft_wrap=True)


def _headlines(report: EvalReport) -> Iterator[str]:
    """The scores of both targets: strict accuracies, and the total of rewards that have none."""
    (other,) = report.against
    strict = {row.reward for row in report.results if row.part == "strict"}
    for ours, theirs in zip(report.results, other.results, strict=True):
        if ours.part == ("strict" if ours.reward in strict else "total"):
            name = ours.reward if ours.part == "total" else f"{ours.reward} {ours.part}"
            yield f"{name}, {counted(ours.steps, 'step')}: {change(theirs.mean, ours.mean)}"
