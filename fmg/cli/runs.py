"""`fmg runs`: what was trained, and what it gained. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli.console import print_json, print_warning, stdout
from fmg.cli.options import AsJson, checked_folder
from fmg.cli.tables import change, table
from fmg.core.errors import CheckpointError, UsageError
from fmg.data.run_metrics import REWARD, headline

if TYPE_CHECKING:
    from fmg.data.run_folder import RunFolder


@dataclass(frozen=True)
class Gain:
    """The first and the last value of one score; None where it was not measured."""

    name: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class RunRow:
    """One run: its folder, model, state, iterations done, reward, and headline score on held-out prompts."""

    run: str
    model: str
    state: str
    iterations: int
    reward: Gain
    held_out: Gain


def runs(
    folder: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="Folder that holds the runs.", show_default="runs")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs, with the reward and the held-out score before and after; files that cannot be read: damaged."""
    from fmg.data.run_folder import RUNS, damaged_runs, list_runs

    root = RUNS if folder is None else checked_folder(folder, "DIR")
    if folder is not None and not root.exists():
        raise UsageError(f"There is no folder '{folder}'", "Name the folder that holds the runs.")
    rows = [*map(_row, list_runs(root)), *(_damaged(run, "-", error) for run, error in damaged_runs(root))]
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
            _gain(row.reward),
            f"{row.held_out.name} {_gain(row.held_out)}",
        )
        for row in rows
    ]
    columns = ["run", "model", "state", "iterations", "reward", "held out"]
    out.print(table(columns, cells, right=["iterations"]))


def _row(run: RunFolder) -> RunRow:
    from fmg.data.run_folder import read_metrics

    state = run.state()
    try:
        lines = [_finite(line) for line in read_metrics(run.metrics)]
    except CheckpointError as error:
        return _damaged(run, state.model, error)
    done = max((int(line.get("iteration", 0)) for line in lines), default=0)
    scored = [headline(line) for line in lines]
    names = next((list(scores) for scores in scored if scores), [])
    held_out = _first_and_last(scored, names[0]) if names else Gain("-", None, None)
    return RunRow(str(run.path), state.model, state.state, done, _first_and_last(lines, REWARD), held_out)


def _damaged(run: RunFolder, model: str, why: CheckpointError) -> RunRow:
    print_warning(why.text)
    nothing = Gain("-", None, None)
    return RunRow(str(run.path), model, "damaged", 0, nothing, nothing)


def _finite(line: Mapping[str, object]) -> dict[str, float]:
    return {key: value for key, value in line.items() if isinstance(value, (int, float)) and math.isfinite(value)}


def _first_and_last(lines: Sequence[Mapping[str, float]], key: str) -> Gain:
    values = [line[key] for line in lines if key in line]
    return Gain(key, values[0] if values else None, values[-1] if values else None)


def _gain(gain: Gain) -> str:
    return change(gain.before, gain.after)
