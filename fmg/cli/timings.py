"""Timings as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fmg.cli.tables import table
from fmg.core.display import counted
from fmg.core.profiling import NOISE, OTHER, TEXT_ENCODERS, TOKENISE, TOTAL, TRANSFORMER, VAE

if TYPE_CHECKING:
    from fmg.inference.benchmark import Ratio, Timing

_TITLES = {
    TOKENISE: "tokenise",
    TEXT_ENCODERS: "text encoders",
    NOISE: "noise",
    TRANSFORMER: "transformer",
    VAE: "VAE decoder",
    OTHER: "other",
    TOTAL: "total",
}


def print_timing(console: Console, timing: Timing) -> None:
    """What was measured, a table of its stages, and what it comes to."""
    what, result = timing_lines(timing)
    console.print(f"\n{what}", soft_wrap=True)
    console.print(timing_table(timing))
    console.print(result, soft_wrap=True)


def timing_table(timing: Timing) -> Table:
    """One row a stage."""
    rows = []
    for stage, time in timing.stages.items():
        title = f"{_TITLES[stage]} x {timing.steps}" if stage == TRANSFORMER else _TITLES[stage]
        rows.append((title, *(_milliseconds(value) for value in (time.p50, time.p90, time.min))))
    return table(["stage", "p50 ms", "p90 ms", "min ms"], rows, right=["p50 ms", "p90 ms", "min ms"])


def timing_lines(timing: Timing) -> tuple[str, str]:
    """What was measured, and what it comes to."""
    what = (
        f"{timing.label}: {timing.backend} ({timing.detail}) on {timing.device}, {counted(timing.images, 'image')},"
        f" batch {timing.batch}, {counted(timing.steps, 'step')}, {counted(timing.repeats, 'repeat')}"
    )
    where = "process" if timing.device == "cpu" else "device"
    return (
        what,
        f"{timing.images_per_second:.1f} images/s, peak memory of the {where} {timing.peak_memory / 1e9:.2f} GB",
    )


def ratio_lines(ratios: Sequence[Ratio]) -> list[str]:
    """One line for each generator after the first."""
    return [
        f"{_at(ratio.label, ratio.steps)} is {ratio.p50:.2f} times as fast as"
        f" {_at(ratio.reference, ratio.reference_steps)} (p10 {ratio.p10:.2f}, p90 {ratio.p90:.2f} over the repeats)"
        for ratio in ratios
    ]


def _at(label: str, steps: int) -> str:
    return f"{label} at {counted(steps, 'step')}"


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
