"""Table and figure of a study: arms side by side, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Entry = Mapping[str, Any]
Score = tuple[str, str]


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
    """One row an arm: each score after the last iteration, by seed; and what the run keeps against its base, at each
    number of steps: the mean over seeds, from the lowest to the highest bound of the seeds' paired 95 % intervals."""
    names = [" ".join(score) for score in scores]
    heads = ["arm", "seeds", *(f"{name} at the end" for name in names)]
    heads += [f"kept: {name}, {count} steps" for name in names for count in steps]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm, units in by_arm(results, list(arms)).items():
        cells = [arms[arm], str(len(units))]
        for score in scores:
            ends = [course(unit, score) for unit in units]
            cells.append(", ".join(f"{end[max(end)]:.3f}" if end else "not measured" for end in ends))
        for score in scores:
            for count in steps:
                means, lows, highs = zip(*(differences(unit, count, score) for unit in units), strict=True)
                cells.append(f"{mean(means):+.3f} ({min(lows):+.3f} to {max(highs):+.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(
    results: Sequence[Entry], arms: Sequence[str], steps: Sequence[int], main: Score, other: Score, path: Path
) -> None:
    """Curves on held-out prompts with the band between the lowest and the highest seed, for both scores; below, the
    change of one against that of the other at each number of steps, a point a seed, with paired 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 8.6), dpi=120, layout="constrained")
    panels = drawing.subplots(2, 2)
    for number, (arm, units) in enumerate(by_arm(results, arms).items()):
        color = f"C{number}"
        for panel, score in zip(panels[0], (main, other), strict=True):
            _curve(panel, units, score, arm, color)
        for panel, count in zip(panels[1], steps, strict=False):
            for unit in units:
                (x, x_low, x_high), (y, y_low, y_high) = (differences(unit, count, s) for s in (main, other))
                panel.errorbar(
                    x,
                    y,
                    xerr=[[x - x_low], [x_high - x]],
                    yerr=[[y - y_low], [y_high - y]],
                    fmt="o",
                    ms=4,
                    lw=1,
                    color=color,
                )
    for panel, score in zip(panels[0], (main, other), strict=True):
        panel.set_title(f"held out: {' '.join(score)}", fontsize=11)
        panel.set_xlabel("iteration")
    for panel, count in zip(panels[1], steps, strict=False):
        panel.axhline(0, color="#333", linewidth=0.8)
        panel.axvline(0, color="#333", linewidth=0.8)
        panel.set_title(f"change against the base at {count} steps", fontsize=11)
        panel.set_xlabel(" ".join(main))
        panel.set_ylabel(" ".join(other))
    for panel in panels.ravel():
        panel.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    draft = path.with_suffix(".partial.png")
    drawing.savefig(draft)
    draft.replace(path)


def _curve(panel: Any, units: Sequence[Entry], score: Score, label: str, color: str) -> None:
    courses = [course(unit, score) for unit in units]
    at = sorted(set.intersection(*map(set, courses)))
    values = [[values[i] for values in courses] for i in at]
    panel.plot(at, [mean(row) for row in values], label=label, color=color, linewidth=1.7, marker="o", ms=3)
    panel.fill_between(at, [min(row) for row in values], [max(row) for row in values], color=color, alpha=0.15, lw=0)
