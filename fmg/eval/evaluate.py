"""`evaluate`: one or two targets, several rewards, several numbers of steps, the same prompts and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fmg.core.errors import UsageError
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.protocols import Reward
from fmg.data.prompt_sets import load_prompts
from fmg.eval.intervals import bootstrap_mean
from fmg.eval.scoring import EvalSet, Scores, prompt_clusters, score_target
from fmg.inference.target import Target, load_target, resolve_target
from fmg.rewards.base import build_rewards, check_prompts

SCHEMA = 1
BASE = "base"


@dataclass(frozen=True)
class Result:
    """Mean score of one part of one reward at one number of steps, with a 95 % bootstrap interval over prompts."""

    steps: int
    reward: str
    part: str
    mean: float
    std: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Paired difference target minus other (same prompts and seeds), with a 95 % bootstrap interval over prompts."""

    steps: int
    reward: str
    part: str
    mean: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class EvalReport:
    """What `fmg eval --json` prints; `against` and `differences` are empty for a single target."""

    target: str
    adapter: str | None
    seed: int
    num: int
    grid: str
    prompts: str
    results: tuple[Result, ...]
    against: tuple[EvalReport, ...]
    differences: tuple[Difference, ...]

    def result(self, reward: str, part: str, steps: int) -> Result:
        """The row of one score."""
        return next(r for r in self.results if (r.reward, r.part, r.steps) == (reward, part, steps))

    def to_json(self) -> dict[str, object]:
        """The report as plain JSON values; unbounded intervals are null (docs/schemas/eval.schema.json)."""
        out: dict[str, object] = {
            "schema": SCHEMA,
            "target": self.target,
            "adapter": self.adapter,
            "seed": self.seed,
            "num": self.num,
            "grid": self.grid,
            "prompts": self.prompts,
            "results": [_plain(row) for row in self.results],
        }
        if self.against:
            out["against"] = self.against[0].to_json()
            out["differences"] = [_plain(row) for row in self.differences]
        return out


def evaluate(
    target: str | Path | None = None,
    *,
    against: str | Path | None = None,
    prompts: str | None = None,
    rewards: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    grid: str | None = None,
    num: int = 1000,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "fp32",
    batch_size: int | None = None,
    allow_code: bool = False,
    observer: Observer = ignore,
) -> EvalReport:
    """Draws `num` images of a target with its native few-step sampler and scores them.

    Args:
        target: model name or run folder; None is the newest run.
        against: a second target, or `base` for the target's own model without its adapter; differences are paired image
            by image.
        prompts: prompt set by name or file; None takes the recipe's evaluation set.
        rewards: rewards by name (`python:module:fn` allowed); None takes the recipe's own and its evaluation rewards.
        steps: numbers of network calls to sweep; None takes the recipe's.
        grid: time grid by name; None takes the target's recipe's, for both targets.
        num: images for each number of steps.
        seed: evaluation seed.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `fp32` or `bf16`.
        batch_size: images a network call; None takes the default.
        allow_code: whether rewards that the recipe of a run names as code may run; `rewards` given here always may.
        observer: receives `StageProgress` events.

    Raises:
        UsageError: unknown target, reward, prompt set or grid, or a number out of range.
    """
    if num < 1:
        raise UsageError(f"The number of images is {num}", "Give --num of at least 1.")
    first = resolve_target(target, allow_code=allow_code or bool(rewards))
    other = _other(first, against)
    set_name = prompts or first.recipe.eval.prompts.name
    prompt_set = load_prompts(prompts or first.recipe.eval.prompts)
    scorers = build_rewards(rewards or first.recipe.measured_rewards)
    eval_set = EvalSet.make(prompt_set, num, seed)
    for name, reward in scorers.items():
        check_prompts(name, reward, eval_set.prompts)
    sweep = tuple(steps) if steps else (first.recipe.rollout.steps,)
    times = grid or first.recipe.rollout.grid
    runs = [_Run(t, scorers, eval_set, sweep, times, device, dtype, batch_size, observer) for t in (first, other) if t]
    scored = [run.scores() for run in runs]
    reports = [_report(run, scores, set_name, seed) for run, scores in zip(runs, scored, strict=True)]
    if other is None:
        return reports[0]
    return replace(reports[0], against=(reports[1],), differences=_differences(scored[0], scored[1]))


def _other(first: Target, against: str | Path | None) -> Target | None:
    if against is None:
        return None
    # only the rewards of the first target are measured, so code that the other's recipe names stays unused
    return first.base() if against == BASE else resolve_target(against, allow_code=True)


@dataclass(frozen=True)
class _Run:
    target: Target
    rewards: Mapping[str, Reward]
    eval_set: EvalSet
    sweep: tuple[int, ...]
    grid: str | tuple[float, ...]
    device: str
    dtype: str
    batch_size: int | None
    observer: Observer

    def scores(self) -> dict[int, Scores]:
        generator = load_target(self.target, device=self.device, dtype=self.dtype, batch_size=self.batch_size)
        for count in self.sweep:
            generator.times(count, self.grid)
        out = {}
        for count in self.sweep:
            progress = partial(self._report_progress, f"{self.target.label}, {count} steps")
            out[count] = score_target(
                generator, self.rewards, self.eval_set, steps=count, grid=self.grid, progress=progress
            )
        return out

    def _report_progress(self, stage: str, done: int, total: int) -> None:
        self.observer(StageProgress(stage, done, total))


def _report(run: _Run, scored: Mapping[int, Scores], prompts: str, seed: int) -> EvalReport:
    results = []
    for steps, scores in scored.items():
        clusters = prompt_clusters(scores.prompts)
        for (reward, part), values in scores.parts.items():
            low_high = _interval(values, clusters)
            results.append(Result(steps, reward, part, float(values.mean()), float(values.std()), low_high))
    return EvalReport(
        target=run.target.label,
        adapter=str(run.target.adapter) if run.target.adapter else None,
        seed=seed,
        num=len(run.eval_set.prompts),
        grid=run.grid if isinstance(run.grid, str) else "explicit",
        prompts=prompts,
        results=tuple(results),
        against=(),
        differences=(),
    )


def _differences(first: Mapping[int, Scores], other: Mapping[int, Scores]) -> tuple[Difference, ...]:
    rows = []
    for steps, scores in first.items():
        clusters = prompt_clusters(scores.prompts)
        for key, values in scores.parts.items():
            delta = values - other[steps].parts[key]
            rows.append(Difference(steps, *key, float(delta.mean()), _interval(delta, clusters)))
    return tuple(rows)


def _interval(values: NDArray[np.float64], clusters: NDArray[np.int64]) -> tuple[float, float]:
    # with a single prompt its images are all the evidence there is
    return bootstrap_mean(values, clusters if np.ptp(clusters) > 0 else None)


def _plain(row: Result | Difference) -> dict[str, object]:
    out = asdict(row)
    out["ci95"] = [value if math.isfinite(value) else None for value in row.ci95]
    return out
