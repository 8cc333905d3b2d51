from __future__ import annotations

import math

from rich.console import Console

from fmg.cli.output import change, table
from fmg.core.display import interval, number
from fmg.core.metric_keys import SCORE
from fmg.data.checkpoints import SavedCheckpoint
from fmg.data.run_metrics import Outcome


def test_numbers() -> None:
    assert [number(value) for value in (0.12345, -0.00001, -0.5)] == ["0.123", "0.000", "-0.500"]
    assert change(None, 0.5) == "- -> 0.500"
    assert interval((-math.inf, 0.25)) == "[-, 0.250]"


def test_the_end_of_a_run_shows_what_it_keeps_and_names_the_last_evaluation_beside_it() -> None:
    lines = [{"iteration": float(i), "eval/r_mean": 0.25 * i, "eval/score": 0.0} for i in range(3)]
    columns, rows = Outcome.of(lines, SavedCheckpoint("checkpoint-1", 1, "eval/score", 0.0)).table()
    assert columns == ["held out", "base", "kept (iteration 1)", "last (iteration 2)"]
    assert rows == [["r", "0.000", "0.250", "0.500"]]
    columns, rows = Outcome.of(lines, SavedCheckpoint("checkpoint-2", 2, "eval/score", 0.0)).table()
    assert columns == ["held out", "base", "kept (iteration 2)"]
    damaged = [{SCORE: 9.0}, *lines, {SCORE: 9.0, "iteration": float("nan")}]
    assert Outcome.of(damaged, saved := SavedCheckpoint("checkpoint-2", 2, SCORE, 0.0)) == Outcome.of(lines, saved)
    columns, rows = Outcome.of(lines, SavedCheckpoint("checkpoint-5", 5, "eval/score", None)).table()
    assert rows == [["r", "0.000", "-", "0.500"]]


def test_cells_are_printed_as_they_are_and_numbers_line_up() -> None:
    console = Console(width=80, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(table(["prompt", "score"], [("[red]a :cat:", "0.5"), ("b", "10.25")], right=["score"]))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert lines[-2:] == ["[red]a :cat:     0.5", "b              10.25"]
