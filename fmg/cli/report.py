"""`fmg report`: the page of a run, or a comparison of several."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli import completion
from fmg.cli.console import print_json, stdout
from fmg.cli.options import AsJson, given_text, new_place
from fmg.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fmg.data.run_folder import RunFolder

_COMPARISON = "comparison.html"


class FigureFormat(StrEnum):
    """What curves are written as."""

    PNG = "png"
    SVG = "svg"
    PDF = "pdf"


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...", help="Run folders.", show_default="the newest run", autocompletion=completion.runs
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
        typer.Option("--format", help="Also write the curves as a figure beside the page.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of a run, or a page that compares several: curves, pictures, scores, recipe and timings."""
    from fmg.core.files import write_atomic
    from fmg.data.run_folder import RunFolder, newest_run
    from fmg.data.run_report import RunRecord, run_page, write_comparison, write_run_report

    place = new_place(out, "--out")
    for name in runs or ():
        given_text(name, "RUN")
    newest = newest_run()
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
    """The file of --format: beside the page, by its name; of a run's own report, its `curve` in another format."""
    if figure is None:
        return None
    if place is None and len(folders) == 1:
        return folders[0].path / f"curve.{figure.value}"
    page = place or Path(_COMPARISON)
    picture = page.with_suffix(f".{figure.value}")
    if picture == page:
        raise UsageError(f"--out {page} would be both the page and the figure", "Give the page a name in .html.")
    return new_place(str(picture), "The figure")


def _write_figure(folders: Sequence[RunFolder], picture: Path) -> None:
    from fmg.data.run_report import RunRecord, write_comparison_figure, write_run_figure

    if len(folders) > 1:
        write_comparison_figure(folders, picture)
    else:
        write_run_figure(RunRecord.read(folders[0]), picture)
