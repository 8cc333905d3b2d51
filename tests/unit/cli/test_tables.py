from __future__ import annotations

import math

from rich.console import Console

from fmg.cli.tables import change, interval, number, table


def test_numbers() -> None:
    assert [number(value) for value in (0.12345, -0.00001, -0.5)] == ["0.123", "0.000", "-0.500"]
    assert change(None, 0.5) == "- -> 0.500"
    assert interval((-math.inf, 0.25)) == "[-, 0.250]"


def test_cells_are_printed_as_they_are_and_numbers_line_up() -> None:
    console = Console(width=80, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(table(["prompt", "score"], [("[red]a :cat:", "0.5"), ("b", "10.25")], right=["score"]))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert lines[-2:] == ["[red]a :cat:     0.5", "b              10.25"]
