"""What commands print: results as tables or JSON on stdout; errors, warnings and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fmg.core.display import counted, number, visible, visible_json
from fmg.core.profiling import NOISE, OTHER, SAMPLER, TEXT_ENCODERS, TOKENISE, TOTAL, TRANSFORMER, VAE
from fmg.progress.reporters import SafeConsole

if TYPE_CHECKING:
    from fmg.eval.results import Cells
    from fmg.inference.benchmark import Ratio, Timing

# A pipe has no width of its own; tables for `grep` must not be folded at 80 columns.
_PIPE_WIDTH = 300

_STAGES = {
    TOKENISE: "tokenise",
    TEXT_ENCODERS: "text encoders",
    NOISE: "noise",
    TRANSFORMER: "transformer",
    VAE: "VAE decoder",
    SAMPLER: "whole sampler",
    OTHER: "other",
    TOTAL: "total",
}


def stdout() -> Console:
    """A console on stdout. It prints text as it is: a prompt such as `[red] :x:` is neither markup nor an emoji."""
    return _console(stderr=False)


def stderr() -> Console:
    """A console on stderr."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    interactive = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if interactive else _PIPE_WIDTH
    return SafeConsole(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def tolerate_narrow_encodings() -> None:
    """Replaces characters that the encoding of the terminal lacks, where Python would stop with an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Prints one JSON document on stdout and flushes it, so that the reader of a pipe sees it at once."""
    typer.echo(visible_json(json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)))
    sys.stdout.flush()


def print_error(text: str) -> None:
    """Prints `error: text` on stderr, always on one line."""
    _print_marked("error: ", "red", text)


def print_warning(text: str) -> None:
    """Prints `warning: text` on stderr, always on one line."""
    _print_marked("warning: ", "yellow", text)


def _print_marked(mark: str, colour: str, text: str) -> None:
    typer.secho(mark, fg=colour, bold=True, nl=False, err=True)
    typer.echo(visible(text), err=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A borderless table that fits a terminal and keeps one row per line in a pipe.

    Args:
        columns: headings.
        rows: cells, printed as they are.
        right: headings of the numeric columns, which are aligned to the right and never folded.
    """
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        numeric = column in right
        grid.add_column(column, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        grid.add_row(*map(visible, row))
    return grid


def change(before: float | None, after: float | None) -> str:
    """`before -> after`, with a dash for what was not measured."""
    return " -> ".join("-" if value is None else number(value) for value in (before, after))


def print_cells(console: Console, *tables: Cells) -> None:
    """Prints tables of results with a line between them; leaves out empty ones."""
    for count, cells in enumerate(cells for cells in tables if cells.rows):
        if count:
            console.print()
        console.print(table(cells.columns, cells.rows, right=cells.numeric))


def print_timing(console: Console, timing: Timing) -> None:
    """Prints what was measured, a table with one row per stage, and the throughput."""
    console.print(
        f"\n{timing.label}: {timing.backend} ({timing.detail}) on {timing.device}, {counted(timing.images, 'image')},"
        f" batch {timing.batch}, {counted(timing.steps, 'step')}, {counted(timing.repeats, 'repeat')}",
        soft_wrap=True,
    )
    rows = []
    for stage, time in timing.stages.items():
        title = f"{_STAGES[stage]} x {timing.steps}" if stage == TRANSFORMER else _STAGES[stage]
        rows.append((title, *(f"{ms:.2f}" if ms < 100 else f"{ms:.0f}" for ms in (time.p50, time.p90, time.min))))
    console.print(table(["stage", "p50 ms", "p90 ms", "min ms"], rows, right=["p50 ms", "p90 ms", "min ms"]))
    where = "process" if timing.device == "cpu" else "device"
    console.print(
        f"{timing.images_per_second:.1f} images/s, peak memory of the {where} {timing.peak_memory / 1e9:.2f} GB",
        soft_wrap=True,
    )


def ratio_lines(ratios: Sequence[Ratio]) -> list[str]:
    """One line for each generator after the first: how many times as fast it is."""
    return [
        f"{_at(ratio.label, ratio.steps)} is {ratio.p50:.2f} times as fast as"
        f" {_at(ratio.reference, ratio.reference_steps)} (p10 {ratio.p10:.2f}, p90 {ratio.p90:.2f} over the repeats)"
        for ratio in ratios
    ]


def _at(label: str, steps: int) -> str:
    return f"{label} at {counted(steps, 'step')}"
