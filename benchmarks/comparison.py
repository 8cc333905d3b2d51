"""Tables and figures of a study: arms side by side, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from fmg.data.charts import GREY, frame, new_figure, style, write_figure

Entry = Mapping[str, Any]
Score = tuple[str, str]

BUDGETS = {"images": "images", "nfe": "row-NFE (forward 1, backward 2)", "seconds": "seconds of training (one core)"}
"""What a training spends, and the titles of the axes of a figure."""


@dataclass(frozen=True)
class Band:
    """A curve over what was spent, by axis of `BUDGETS`, with a band around it.

    `look` numbers its colour, marker and dashes, the same in all figures of a study.
    """

    label: str
    look: int
    spent: Mapping[str, Sequence[float]]
    centre: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def reached(points: Sequence[Mapping[str, float]], level: float, axis: str) -> float | None:
    """Where a curve first crosses a level, by linear interpolation; None if it never does."""
    for before, after in pairwise(points):
        if before["score"] < level <= after["score"]:
            share = (level - before["score"]) / (after["score"] - before["score"])
            return before[axis] + share * (after[axis] - before[axis])
    return None


def budget_figure(bands: Sequence[Band], title: str, path: Path, *, height: float, level: float | None = None) -> None:
    """A score over images, row-NFE and seconds, side by side; `level` draws a dotted line."""
    drawing = new_figure(15, height, dpi=120)
    panels = drawing.subplots(1, 3, sharey=True)
    for band in bands:
        look = style(band.look)
        for panel, axis in zip(panels, BUDGETS, strict=True):
            # a logarithmic axis cannot show the start
            shown = slice(0 if axis == "images" else 1, None)
            at = band.spent[axis][shown]
            panel.plot(at, band.centre[shown], label=band.label, **look)
            panel.fill_between(at, band.low[shown], band.high[shown], color=look["color"], alpha=0.13, linewidth=0)
    for panel, label in zip(panels, BUDGETS.values(), strict=True):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        if level is not None:
            panel.axhline(level, color="#999", linewidth=0.8, linestyle=":")
    panels[0].set_ylabel(title)
    for panel in panels[1:]:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:,g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    write_figure(drawing, path)


def by_arm(results: Sequence[Entry], arms: Sequence[str]) -> dict[str, list[Entry]]:
    """The finished units of each arm that has one, in the order of the study, seeds rising."""
    found = {arm: sorted((e for e in results if e["arm"] == arm), key=lambda e: int(e["seed"])) for arm in arms}
    return {arm: units for arm, units in found.items() if units}


def differences(unit: Entry, steps: int, score: Score) -> tuple[float, float, float]:
    """Paired difference to the base and its 95 % interval."""
    row = next(
        r for r in unit["eval"]["differences"] if (r["steps"], r["reward"], r["part"]) == (steps, score[0], score[1])
    )
    return row["mean"], *row["ci95"]


def course(unit: Entry, score: Score) -> dict[int, float]:
    """A score on held-out prompts by iteration, as training measured it."""
    name = score[0] if score[1] == "total" else "_".join(score)
    key = f"eval/{name}_mean"
    return {line["iteration"]: line[key] for line in unit["metrics"] if key in line}


def summary(results: Sequence[Entry], arms: Mapping[str, str], steps: Sequence[int], scores: Sequence[Score]) -> str:
    """One row per arm: each score after the last iteration, by seed; and the kept checkpoint against its base, at
    each number of steps: the mean over seeds, from the lowest to the highest bound of their paired 95 % intervals."""
    names = [" ".join(score) for score in scores]
    heads = ["arm", "seeds", *(f"{name} at the end" for name in names)]
    heads += [f"kept: {name}, {count} steps" for name in names for count in steps]
    rows = []
    for arm, units in by_arm(results, list(arms)).items():
        cells = [arms[arm], str(len(units))]
        for score in scores:
            ends = [course(unit, score) for unit in units]
            cells.append(", ".join(f"{end[max(end)]:.3f}" if end else "not measured" for end in ends))
        for score in scores:
            for count in steps:
                means, lows, highs = zip(*(differences(unit, count, score) for unit in units), strict=True)
                cells.append(f"{mean(means):+.3f} ({min(lows):+.3f} to {max(highs):+.3f})")
        rows.append(cells)
    return markdown(heads, rows)


def figure(
    results: Sequence[Entry], arms: Mapping[str, str], steps: Sequence[int], main: Score, other: Score, path: Path
) -> None:
    """Curves on held-out prompts with the band between the lowest and the highest seed, for both scores; below, the
    change of one against that of the other at each number of steps, a point per seed, with paired 95 % intervals.

    `arms` names the arms as the table does.
    """
    drawing = new_figure(11, 9.2)
    panels = drawing.subplots(2, 2)
    for number, (arm, units) in enumerate(by_arm(results, list(arms)).items()):
        look = style(number)
        for panel, score in zip(panels[0], (main, other), strict=True):
            _curve(panel, units, score, arms[arm], look)
        for panel, count in zip(panels[1], steps, strict=False):
            for unit in units:
                (x, x_low, x_high), (y, y_low, y_high) = (differences(unit, count, s) for s in (main, other))
                panel.errorbar(
                    x,
                    y,
                    xerr=[[x - x_low], [x_high - x]],
                    yerr=[[y - y_low], [y_high - y]],
                    fmt=look["marker"],
                    ms=5,
                    lw=1,
                    color=look["color"],
                )
    for panel, score in zip(panels[0], (main, other), strict=True):
        frame(panel, f"held out: {' '.join(score)}", "iteration", "mean score of the seeds")
    for panel, count in zip(panels[1], steps, strict=False):
        panel.axhline(0, color="#333", linewidth=0.8)
        panel.axvline(0, color="#333", linewidth=0.8)
        frame(
            panel,
            f"kept checkpoint against the base, {count} steps",
            f"difference of {' '.join(main)}",
            f"difference of {' '.join(other)}",
        )
    handles, labels = panels[0][0].get_legend_handles_labels()
    handles.append(Patch(facecolor=GREY, alpha=0.3, linewidth=0))
    labels.append("lowest to highest seed; bars: 95 % intervals")
    drawing.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    write_figure(drawing, path)


def _curve(panel: Any, units: Sequence[Entry], score: Score, label: str, look: Mapping[str, Any]) -> None:
    courses = [course(unit, score) for unit in units]
    at = sorted(set.intersection(*map(set, courses)))
    values = [[values[i] for values in courses] for i in at]
    low, high = [min(row) for row in values], [max(row) for row in values]
    panel.plot(at, [mean(row) for row in values], label=label, zorder=3, **look)
    panel.fill_between(at, low, high, color=look["color"], alpha=0.12, lw=0)
