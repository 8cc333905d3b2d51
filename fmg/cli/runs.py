"""`fmg runs`: what was trained, and what it gained. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli.console import print_json, print_warning, stdout
from fmg.cli.options import AsJson, checked_folder
from fmg.cli.tables import change, number, table
from fmg.core import metric_keys as keys
from fmg.core.errors import CheckpointError, UsageError
from fmg.data.run_metrics import Outcome, headline

if TYPE_CHECKING:
    from fmg.data.run_folder import RunFolder


@dataclass(frozen=True)
class Gain:
    """One score of a run before and after; None where it was not measured."""

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
        kept: iteration of the checkpoint that the run keeps, its result; None before there is one.
        averaged: whether that is a moving average of the weights.
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
        str | None, typer.Argument(metavar="[DIR]", help="Folder that holds the runs.", show_default="runs")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs: what each keeps, and its held-out score before and after; files that cannot be read: damaged."""
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
            "-" if row.kept is None else f"{row.kept}{' (EMA)' * row.averaged}",
            f"{row.held_out.name} {_gain(row.held_out)}",
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


def _gain(gain: Gain) -> str:
    return change(gain.before, gain.after)
