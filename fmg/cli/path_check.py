"""`fmg eval --path-check`: which stochasticizers stay on the probability path of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fmg.cli.console import print_json, stderr, stdout
from fmg.cli.options import figure_format, given_text
from fmg.cli.tables import interval, number, table
from fmg.core.display import counted
from fmg.core.errors import UsageError
from fmg.core.files import check_place
from fmg.progress.figures import signed
from fmg.progress.reporters import LOADING, reporter_for

if TYPE_CHECKING:
    from fmg.eval.path_check import PathReport


def path_check(
    target: str | None,
    out: str,
    *,
    others: Mapping[str, object],
    prompts: str | None,
    rewards: Sequence[str] | None,
    sweep: Sequence[int] | None,
    grid: str | None,
    num: int,
    seed: int,
    device: str,
    dtype: str,
    allow_code: bool,
    as_json: bool,
) -> None:
    """Measures, writes `out` and the JSON beside it, and prints a table.

    Raises:
        UsageError: for another option that does not go with it, a sweep, or a file in the way.
    """
    given_text(out, "--path-check")
    for name, value in others.items():
        if value:
            raise UsageError(f"--{name} does not go with --path-check", "Leave one of the two out.")
    if sweep is not None and len(sweep) > 1:
        raise UsageError("A path check is of one number of steps", "Give --steps one number.")
    picture = Path(out)
    data = picture.with_suffix(".json")
    figure_format(picture, "--path-check")
    for file in (picture, data):
        if file.exists():
            raise UsageError(f"'{file}' exists already", "Name another file; nothing is overwritten.")
    if not picture.parent.is_dir():
        raise UsageError(f"There is no folder '{picture.parent}'", "Make it first.")
    check_place(picture, "--path-check")

    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.core.files import write_atomic
        from fmg.eval.path_check import path_check as check
        from fmg.eval.path_figure import path_figure

        report = check(
            target,
            prompts=prompts,
            rewards=rewards,
            steps=sweep[0] if sweep else None,
            grid=grid,
            num=num,
            seed=seed,
            device=device,
            dtype=dtype,
            allow_code=allow_code,
            observer=reporter,
        )
        path_figure(report, picture)
        write_atomic(data, (json.dumps(report.to_json(), indent=2) + "\n").encode())
    if as_json:
        print_json(report.to_json())
    else:
        _print(report, picture)


def _print(report: PathReport, picture: Path) -> None:
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
    out.print(f"\nPicture: {picture}\nData: {picture.with_suffix('.json')}", soft_wrap=True)
