"""Tables and figures of study.py: who wins at which budget, with intervals over seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from comparison import Band, budget_figure, markdown, reached
from study import ARMS, JUDGE_STEPS, KEPT_STEPS, WORLDS, Entry, score_of

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
AXES = {"images": "images", "nfe": "row-NFE", "seconds": "seconds on one core"}
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Budgets, as shares of what the longest arm spends."""
LEVELS = (0.7, 0.8, 0.9)
BOTH = ("branch", "chain")
OBJECTIVES = [arm for arm in ARMS if arm in (*BOTH, "null") or "objective" in ARMS[arm].values]
KERNELS = [arm for arm in ARMS if arm in BOTH or arm not in OBJECTIVES]
"""The arms of the two figures of a world; `BOTH` are in each."""
# Two-sided 95 % quantiles of Student's t, by degrees of freedom
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Curve:
    """One run: what it had spent, by axis of `AXES`, and what it scored, at every evaluation."""

    seed: int
    spent: Mapping[str, list[float]]
    measured: Mapping[str, list[float]]

    def at(self, axis: str, budget: float, value: str = "score") -> float:
        """A measured value after a budget, by linear interpolation; the last one where the run ended before."""
        return float(np.interp(budget, self.spent[axis], self.measured[value]))

    def crossing(self, level: float) -> float | None:
        """Row-NFE at which the score first reaches a level; None if it never does."""
        points = zip(self.measured["score"], self.spent["nfe"], strict=True)
        return reached([{"score": score, "nfe": spent} for score, spent in points], level, "nfe")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval over seeds (Student's t); infinite for one seed."""
    if len(values) < 2:
        return mean(values), math.inf
    # beyond ten seeds the interval of ten is a little too wide
    return mean(values), _T.get(len(values) - 1, _T[9]) * stdev(values) / math.sqrt(len(values))


def text(values: Sequence[float]) -> str:
    """`mean +- half-width`; the mean alone for one seed, a dash where nothing was measured."""
    if not values or any(map(math.isnan, values)):
        return "-"
    centre, half = interval(values)
    return f"{centre:.3f}" if math.isinf(half) else f"{centre:.3f} ± {half:.3f}"


def curves_of(entries: Sequence[Entry], world: str) -> dict[str, list[Curve]]:
    """The finished runs of a world by arm, in the order of the study.

    An iteration takes the median time of the arm's timing unit. Without one it takes the shortest of all its runs,
    because other processes slowed some of them down.
    """
    runs: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if (entry["world"], entry["kind"], entry["stopped"]) == (world, "run", None):
            runs[entry["arm"]].append(entry)
    timed = {e["arm"]: median(e["iteration_s"][1:]) for e in entries if (e["world"], e["kind"]) == (world, "timing")}
    found = {}
    for arm in ARMS:
        if not (units := sorted(runs[arm], key=lambda e: int(e["seed"]))):
            continue
        pace = timed.get(arm) or min(median(unit["iteration_s"]) for unit in units)
        found[arm] = [_curve(unit, pace) for unit in units]
    return found


def _curve(unit: Mapping[str, Any], pace: float) -> Curve:
    points = unit["points"]
    iterations = [point["iteration"] for point in points]
    spent = {
        "images": [unit["images"] * i for i in iterations],
        "nfe": [point["nfe"] for point in points],
        "seconds": [pace * i for i in iterations],
    }
    measured = {key: [point.get(key, math.nan) for point in points] for key in ("score", "quality")}
    # as a share of that before training, which is not the same for rollouts of chains and held-out samples of branches
    shares: list[float] = []
    for point in points:
        # the last point of a chain has none of its own
        shares.append(point["diversity"] / points[0]["diversity"] if "diversity" in point else shares[-1])
    measured["diversity"] = shares
    return Curve(unit["seed"], spent, measured)


def search_table(entries: Sequence[Entry], world: str) -> str:
    """The score after every trial of the search of the learning rate, on prompts of the training set."""
    rows = []
    for arm in ARMS:
        trials = {e["lr"]: e for e in entries if (e["world"], e["arm"], e["kind"]) == (world, arm, "trial")}
        if trials:
            best = max(sorted(trials), key=lambda rate: score_of(trials[rate]))
            cells = [f"{r:g}: {'stopped' if e['stopped'] else f'{score_of(e):.3f}'}" for r, e in sorted(trials.items())]
            rows.append([f"`{arm}`", ", ".join(cells), f"{best:g}"])
    return markdown(["arm", "learning rate: score", "chosen"], rows)


def end_table(entries: Sequence[Entry], world: str, curves: Mapping[str, list[Curve]]) -> str:
    """Every arm after its last iteration, and its kept checkpoint at other numbers of steps."""
    rows = []
    task = WORLDS[world]
    columns = {f"kept, {steps} NFE": f"{task.score}@{steps}" for steps in KEPT_STEPS}
    if task.judge:
        columns[f"kept, `{task.judge}` exact"] = f"{task.judge}_exact@{JUDGE_STEPS}"
    columns["kept, diversity"] = "diversity_within_prompts@4"
    for arm, runs in curves.items():
        last = [{key: values[-1] for key, values in run.measured.items()} for run in runs]
        kept = [e["kept"] for e in entries if (e["world"], e["arm"], e["kind"]) == (world, arm, "run") and e["kept"]]
        # a gate ends a run that diverges, so the means are those of the seeds that did not
        ended = sum((e["world"], e["arm"], e["kind"]) == (world, arm, "run") and bool(e["stopped"]) for e in entries)
        rows.append(
            [
                f"`{arm}`",
                f"{len(runs)} ({ended} stopped)" if ended else str(len(runs)),
                *(text([values[key] for values in last]) for key in ("score", "quality")),
                *(text([k[key] for k in kept]) for key in columns.values()),
                f"{runs[0].spent['nfe'][-1] / 1000:.1f}",
                f"{runs[0].spent['seconds'][-1]:.0f}",
            ]
        )  # fmt: skip
    return markdown(["arm", "seeds", "score", "quality", *columns, "1000 row-NFE", "seconds"], rows)


def winners_table(curves: Mapping[str, list[Curve]]) -> str:
    """The best arm at every budget, and the arms that these seeds cannot tell from it.

    Two arms cannot be told apart where the 95 % interval of their difference, paired by seed, contains 0.
    """
    rows = []
    for axis, label in AXES.items():
        longest = max(run.spent[axis][-1] for runs in curves.values() for run in runs)
        for share in SHARES:
            budget = float(f"{share * longest:.2g}")
            at = {arm: {run.seed: run.at(axis, budget) for run in runs} for arm, runs in curves.items()}
            best = max(at, key=lambda arm: mean(at[arm].values()))
            tied = [f"`{arm}`" for arm in at if arm != best and not _below(at[arm], at[best])]
            rows.append([f"{budget:,.10g} {label}", f"`{best}`", text([*at[best].values()]), ", ".join(tied) or "none"])
    return markdown(["budget", "best", "score", "not told apart from it"], rows)


def _below(arm: Mapping[int, float], best: Mapping[int, float]) -> bool:
    centre, half = interval([best[seed] - arm[seed] for seed in arm if seed in best] or [0.0])
    return centre - half > 0


def equal_reward_table(curves: Mapping[str, list[Curve]]) -> str:
    """Quality and diversity where each curve first reaches a score; the number of seeds that do.

    Diversity is a share of that before training.
    """
    rows = []
    for arm, runs in curves.items():
        row = [f"`{arm}`"]
        for level in LEVELS:
            crossed = [(run, at) for run in runs if (at := run.crossing(level)) is not None]
            if not crossed:
                row += ["0", "-", "-", "-"]
                continue
            row += [str(len(crossed)), text([at / 1000 for _, at in crossed])]
            row += [text([run.at("nfe", at, key) for run, at in crossed]) for key in ("quality", "diversity")]
        rows.append(row)
    heads = [f"{level:g}: {head}" for level in LEVELS for head in ("seeds", "1000 row-NFE", "quality", "diversity")]
    return markdown(["arm", *heads], rows)


def figure(world: str, curves: Mapping[str, list[Curve]], arms: Sequence[str], path: Path) -> None:
    """The score of `arms` over images, row-NFE and seconds: mean over seeds, band of the 95 % interval."""
    bands = []
    for look, arm in enumerate(arms):
        if not (runs := curves.get(arm)):
            continue
        spent = {axis: [mean(at) for at in zip(*(run.spent[axis] for run in runs), strict=True)] for axis in AXES}
        centre, half = np.transpose([interval(s) for s in zip(*(run.measured["score"] for run in runs), strict=True)])
        half[np.isinf(half)] = 0.0
        low, high = (np.clip(centre + sign * half, 0, 1).tolist() for sign in (-1, 1))
        bands.append(Band(ARMS[arm].about, look, spent, centre.tolist(), low, high))
    budget_figure(bands, f"held out: {WORLDS[world].score.replace('_', ' ')}", path, height=5.6)


def report(entries: Sequence[Entry]) -> None:
    """Prints the tables of every world that has results, and draws its figure."""
    for world in WORLDS:
        if not (curves := curves_of(entries, world)):
            continue
        print(f"## {WORLDS[world].model}\n")
        for table in (
            winners_table(curves),
            end_table(entries, world, curves),
            equal_reward_table(curves),
            search_table(entries, world),
        ):
            print(table, end="\n\n")
        figure(world, curves, OBJECTIVES, PICTURES / f"study-{world}.png")
        if len(curves.keys() & set(KERNELS)) > len(BOTH):
            figure(world, curves, KERNELS, PICTURES / f"study-{world}-kernels.png")
