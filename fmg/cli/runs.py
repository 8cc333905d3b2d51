"""`fmg runs` and `fmg report`: runs and their gains, as a list and as pages. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli import completion
from fmg.cli.options import AsJson, checked_folder, new_place
from fmg.cli.output import change, print_json, print_warning, stdout, table
from fmg.core import metric_keys as keys
from fmg.core.display import number
from fmg.core.errors import CheckpointError, UsageError
from fmg.data.run_metrics import Outcome, headline

if TYPE_CHECKING:
    from fmg.data.run_folder import RunFolder

_COMPARISON = "comparison.html"


@dataclass(frozen=True)
class Gain:
    """One score of a run before and after; None if it was not measured."""

    name: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Result(Gain):
    """The headline score of the base, of the checkpoint that the run keeps (`after`), and of the last evaluation."""

    last: float | None


@dataclass(frozen=True)
class RunRow:
    """One run.

    Attributes:
        run: its folder.
        model: its name.
        state: as in `run.json`, or `damaged`.
        iterations: iterations done.
        kept: iteration of the checkpoint that the run keeps as its result; None before there is one.
        averaged: whether that checkpoint is a moving average of the weights.
        reward: mean reward on training prompts in the first and the last iteration.
        held_out: the headline score on held-out prompts.
    """

    run: str
    model: str
    state: str
    iterations: int
    kept: int | None
    averaged: bool
    reward: Gain
    held_out: Result


def runs(
    folder: Annotated[
        str | None, typer.Argument(metavar="DIR", help="Folder of the runs.", show_default="runs")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs with the checkpoint that each keeps and its held-out score before and after."""
    from fmg.data.run_folder import RUNS, sorted_runs

    root = RUNS if folder is None else checked_folder(folder, "DIR")
    if folder is not None and not root.exists():
        raise UsageError(f"There is no folder '{folder}'", "Name the folder that contains the runs.")
    readable, damaged = sorted_runs(root)
    rows = [*map(_row, readable), *(_damaged(run, "-", error) for run, error in damaged)]
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    out = stdout()
    if not rows:
        out.print(f"There is no run under '{root}' yet. Train one with `fmg train`.")
        return
    cells = [
        (
            row.run,
            row.model,
            row.state,
            str(row.iterations),
            change(row.reward.before, row.reward.after),
            "-" if row.kept is None else f"{row.kept}{' (EMA)' * row.averaged}",
            f"{row.held_out.name} {change(row.held_out.before, row.held_out.after)}",
            "-" if row.held_out.last is None else number(row.held_out.last),
        )
        for row in rows
    ]
    columns = ["run", "model", "state", "iterations", "reward", "kept", "held out", "last"]
    out.print(table(columns, cells, right=["iterations", "kept", "last"]))


def _row(run: RunFolder) -> RunRow:
    import numpy as np

    from fmg.data.checkpoints import read_index
    from fmg.data.metrics_log import MetricsLog

    state = run.state()
    try:
        log = MetricsLog.read(run.metrics)
        index = read_index(run.path)
    except CheckpointError as error:
        return _damaged(run, state.model, error)
    outcome = Outcome.of(log.evaluations, index.entry(index.best) if index else None)
    base, kept, last = map(headline, (outcome.base, outcome.kept, outcome.last))
    name = next(iter(base), "-")
    held_out = Result(name, base.get(name), kept.get(name), last.get(name))
    rewards = log.columns(keys.REWARD)[1]
    rewards = rewards[np.isfinite(rewards)]
    reward = Gain(keys.REWARD, *((float(rewards[0]), float(rewards[-1])) if len(rewards) else (None, None)))
    return RunRow(
        str(run.path), state.model, state.state, log.done, outcome.iteration, outcome.averaged, reward, held_out
    )


def _damaged(run: RunFolder, model: str, why: CheckpointError) -> RunRow:
    print_warning(why.text)
    return RunRow(str(run.path), model, "damaged", 0, None, False, Gain("-", None, None), Result("-", None, None, None))


class FigureFormat(StrEnum):
    """File formats of curves."""

    PNG = "png"
    SVG = "svg"
    PDF = "pdf"


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN", help="Run folders.", show_default="the newest run", autocompletion=completion.runs
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="F.html",
            help="Where to write.",
            show_default=f"report.html in the run's folder; {_COMPARISON} for several",
        ),
    ] = None,
    figure: Annotated[
        FigureFormat | None,
        typer.Option("--format", help="Also write the curves as a figure next to the page.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of a run, or a page that compares several: curves, images, scores, recipe and timings."""
    from fmg.core.files import write_atomic
    from fmg.data.run_folder import RunFolder, newest_run
    from fmg.data.run_report import RunRecord, run_page, write_comparison, write_run_report

    place = new_place(out, "--out")
    newest = None if runs else newest_run()
    if not runs and newest is None:
        raise UsageError("There is no run under 'runs' yet", "Train one with `fmg train`, or name a run folder.")
    folders = [RunFolder(Path(name)) for name in runs or [str(newest)]]
    picture = _figure_file(place, folders, figure)
    if len(folders) > 1:
        path = place or Path(_COMPARISON)
        write_comparison(folders, path)
    elif place is None:
        path = write_run_report(folders[0])
    else:
        path = place
        text = run_page(RunRecord.read(folders[0]))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
    if picture is not None:
        _write_figure(folders, picture)
    if as_json:
        print_json({"report": str(path)} | ({} if picture is None else {"figure": str(picture)}))
        return
    stdout().print(f"Report: {path}", soft_wrap=True)
    if picture is not None:
        stdout().print(f"Figure: {picture}", soft_wrap=True)


def _figure_file(place: Path | None, folders: Sequence[RunFolder], figure: FigureFormat | None) -> Path | None:
    """The figure of --format: next to the page and named like it; for a run's own report, its `curve`."""
    if figure is None:
        return None
    if place is None and len(folders) == 1:
        return folders[0].path / f"curve.{figure.value}"
    page = place or Path(_COMPARISON)
    picture = page.with_suffix(f".{figure.value}")
    if picture == page:
        raise UsageError(f"--out {page} would be both the page and the figure", "Give the page a name ending in .html.")
    return new_place(str(picture), "The figure")


def _write_figure(folders: Sequence[RunFolder], picture: Path) -> None:
    from fmg.data.run_report import RunRecord, write_comparison_figure, write_run_figure

    if len(folders) > 1:
        write_comparison_figure(folders, picture)
    else:
        write_run_figure(RunRecord.read(folders[0]), picture)
