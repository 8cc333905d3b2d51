"""`fmg report`: the page of a run, or a comparison of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fmg.cli import completion
from fmg.cli.console import print_json, stdout
from fmg.cli.options import AsJson, given_text, new_place
from fmg.core.errors import UsageError

_COMPARISON = "comparison.html"


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
    as_json: AsJson = False,
) -> None:
    """Write the report of a run, or a page that compares several: curves, pictures, scores, recipe and timings."""
    from fmg.core.unfinished import write_atomic
    from fmg.data.comparison import write_comparison
    from fmg.data.run_folder import RunFolder, newest_run
    from fmg.data.run_report import RunRecord, run_page, write_run_report

    place = new_place(out, "--out")
    for name in runs or ():
        given_text(name, "RUN")
    newest = newest_run()
    if not runs and newest is None:
        raise UsageError("There is no run under 'runs' yet", "Train one with `fmg train`, or name a run folder.")
    folders = [RunFolder(Path(name)) for name in runs or [str(newest)]]
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
    if as_json:
        print_json({"report": str(path)})
    else:
        stdout().print(f"Report: {path}", soft_wrap=True)
