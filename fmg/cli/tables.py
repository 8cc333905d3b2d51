"""Tables that look right on a terminal and stay one row a line in a pipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.table import Table

from fmg.core.display import visible


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A borderless table.

    Args:
        columns: headings.
        rows: cells, printed as they are.
        right: headings of the columns with numbers, which are aligned to the right and never folded.
    """
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        number = column in right
        grid.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        grid.add_row(*map(visible, row))
    return grid


def number(value: float) -> str:
    """A score, with three decimals; what rounds to nothing has no sign."""
    return f"{round(value, 3) + 0.0:.3f}"


def compact(value: float) -> str:
    """A number of unknown size, with three digits."""
    return f"{value:.3g}"


def change(before: float | None, after: float | None) -> str:
    """`before -> after`, with a dash for what was not measured."""
    return " -> ".join("-" if value is None else number(value) for value in (before, after))


def interval(bounds: Sequence[float], form: Callable[[float], str] = number) -> str:
    """A confidence interval; unbounded sides are dashes."""
    low, high = (form(bound) if math.isfinite(bound) else "-" for bound in bounds)
    return f"[{low}, {high}]"
