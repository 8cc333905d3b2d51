"""Reward against latency: one target with several numbers of steps, on several backends, with and without adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fmg.core.display import counted, plot_label
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.files import partial_folder
from fmg.data.charts import frame, new_figure, style, write_figure
from fmg.data.prompt_sets import load_prompts
from fmg.eval.scoring import EvalSet, result_rows, score_target
from fmg.export.swap import copy_without_adapter
from fmg.inference.artifact.layout import Artifact
from fmg.inference.benchmark import (
    BenchCase,
    BenchOptions,
    Ratio,
    StageTime,
    Timing,
    Workload,
    measure,
    open_cases,
    ratios,
)
from fmg.inference.loading import made_from
from fmg.inference.target import Target
from fmg.rewards.base import build_rewards, check_prompts


@dataclass(frozen=True)
class Point:
    """One case with one number of steps.

    Attributes:
        label: label of the case.
        backend: what ran it.
        adapter: whether the adapter was applied.
        steps: sampling steps per image (NFE).
        reward: which reward of the run.
        mean: its mean over the images.
        ci95: bootstrap interval over prompts.
        num: number of scored images.
        latency_ms: total time of one batch in milliseconds.
    """

    label: str
    backend: str
    adapter: bool
    steps: int
    reward: str
    mean: float
    ci95: tuple[float, float]
    num: int
    latency_ms: StageTime

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an unbounded side of the interval is null."""
        return asdict(self) | {"ci95": [bound if math.isfinite(bound) else None for bound in self.ci95]}


@dataclass(frozen=True)
class Frontier:
    """All points, their timings, and how the cases compare at each number of steps."""

    points: tuple[Point, ...]
    timings: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]


@dataclass(frozen=True)
class FrontierPlan:
    """The measurements at every point.

    Attributes:
        steps: numbers of sampling steps (NFE).
        num: scored images per point.
        repeats: timed runs of one batch.
        warmup: runs before them.
        batch: batch size of the timed runs. Scored images are generated in the default batches.
        grid: time grid by name; None takes the target's.
        seed: seed of the scored images.
        encode: whether prompts are encoded in every repeat.
    """

    steps: tuple[int, ...]
    num: int
    repeats: int
    warmup: int = 1
    batch: int = 1
    grid: str | None = None
    seed: int = 0
    encode: bool = True


def frontier(
    cases: Sequence[BenchCase],
    options: BenchOptions,
    plan: FrontierPlan,
    *,
    allow_code: bool = False,
    observer: Observer = ignore,
) -> Frontier:
    """Measures and scores every case with every number of steps; cases with an adapter also without it.

    Args:
        cases: forms of one target.
        options: how they are opened.
        plan: what is measured.
        allow_code: whether the recipe of a run may name reward code.
        observer: receives the progress.

    Raises:
        UsageError: the run of an artifact no longer exists, or a number of steps does not fit the grid.
    """
    subject = cases[0].subject
    target = made_from(subject, allow_code=allow_code, observer=observer) if isinstance(subject, Artifact) else subject
    rewards = build_rewards(target.recipe.rewards)
    images = EvalSet.make(load_prompts(target.recipe.eval.prompts), plan.num, plan.seed)
    for label, reward in rewards.items():
        check_prompts(label, reward, images.prompts)
    points: list[Point] = []
    timings: list[Timing] = []
    compared: list[Ratio] = []
    with ExitStack() as stack:
        both = stack.enter_context(with_bases(cases))
        generators = open_cases(both, options, stack)
        for generator in generators.values():
            for count in plan.steps:
                generator.times(count, plan.grid)
        for count in plan.steps:
            measured = measure(
                generators,
                Workload.of(images.prompts, plan.batch, steps=count, grid=plan.grid),
                repeats=plan.repeats,
                warmup=plan.warmup,
                encode=plan.encode,
                progress=_reporting(observer, f"timing, {counted(count, 'step')}"),
            )
            timings += measured.values()
            compared += ratios(measured)
            for case in both:
                timing = measured[case.label]
                scores = score_target(
                    generators[case.label],
                    rewards,
                    images,
                    steps=count,
                    grid=plan.grid,
                    progress=_reporting(observer, f"{case.label}, {counted(count, 'step')}"),
                )
                points += [
                    Point(
                        case.label,
                        case.backend.label,
                        case.adapter,
                        count,
                        row.reward,
                        row.mean,
                        row.ci95,
                        plan.num,
                        timing.stages["total"],
                    )
                    for row in result_rows(count, scores)
                    if row.part == "total"
                ]
    return Frontier(tuple(points), tuple(timings), tuple(compared))


@contextmanager
def with_bases(cases: Sequence[BenchCase]) -> Iterator[list[BenchCase]]:
    """The cases, each tuned one followed by its base; bases of artifacts are created temporarily."""
    with ExitStack() as stack:
        both, bases = [], dict[Path, Artifact]()
        for case in cases:
            subject = case.subject
            if not isinstance(subject, Artifact):
                tuned = subject.adapter is not None
                base: Target | Artifact = subject
            else:
                tuned = subject.manifest.adapter is not None
                if tuned and subject.folder not in bases:
                    # on the same file system, so that gigabytes are linked, not copied
                    beside = stack.enter_context(partial_folder(subject.folder.resolve()))
                    bases[subject.folder] = copy_without_adapter(subject, beside / "base")
                base = bases.get(subject.folder, subject)
            if tuned:
                both.append(replace(case, label=f"{case.label}, tuned"))
            both.append(replace(case, label=f"{case.label}, base", subject=base, adapter=False))
        yield both


def _reporting(observer: Observer, stage: str) -> Any:
    return lambda done, total: observer(StageProgress(stage, done, total))


def frontier_figure(points: Sequence[Point], path: Path, title: str) -> None:
    """Writes a figure with a panel per reward: its mean with interval against latency, labelled with the steps."""
    rewards = list(dict.fromkeys(point.reward for point in points))
    figure = new_figure(6.4 * len(rewards), 4.4)
    styles = {name: style(i) for i, name in enumerate(dict.fromkeys(point.backend for point in points))}
    for axes, reward in zip(figure.subplots(1, len(rewards), squeeze=False)[0], rewards, strict=True):
        for number, label in enumerate(dict.fromkeys(point.label for point in points)):
            line = [point for point in points if (point.label, point.reward) == (label, reward)]
            x, y = [point.latency_ms.p50 for point in line], [point.mean for point in line]
            errors = [[point.mean - point.ci95[0] for point in line], [point.ci95[1] - point.mean for point in line]]
            axes.errorbar(
                x,
                y,
                yerr=errors,
                label=plot_label(label),
                capsize=2,
                **styles[line[0].backend] | {"linestyle": "-" if line[0].adapter else "--"},
            )
            for point in line:
                axes.annotate(
                    str(point.steps),
                    (point.latency_ms.p50, point.mean),
                    # above and below, so that labels of lines that meet do not overlap
                    (5, 5 if number % 2 == 0 else -11),
                    textcoords="offset points",
                    fontsize=8,
                    color=styles[line[0].backend]["color"],
                )
        frame(axes, "", "latency of one batch, ms (median)", f"{reward}, mean with 95 % interval")
        axes.set_xscale("log")
        for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            ticks("{x:g}")
        axes.tick_params(axis="x", which="both", labelsize=7)
        axes.legend(frameon=False, fontsize=8, loc="best", handlelength=3.5)
    figure.suptitle(f"{plot_label(title)}: reward against latency, steps at the points", fontsize=11)
    write_figure(figure, path)
