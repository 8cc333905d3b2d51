"""`evaluate`: one or two targets, several rewards, several numbers of steps, the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path

from fmg.core.display import counted
from fmg.core.errors import UsageError, python_call
from fmg.core.events import Notice, Observer, StageProgress
from fmg.core.prompt import tell_of_cuts
from fmg.core.protocols import FeatureExtractor, Reward
from fmg.core.stdout_redirect import torch_as_new
from fmg.data.prompt_sets import load_prompts
from fmg.eval.image_folders import DUMP_FORMATS, geneval_dump
from fmg.eval.report import ImageGallery, check_report, write_report
from fmg.eval.results import EvalReport
from fmg.eval.scoring import (
    EvalSet,
    Scores,
    Sink,
    chosen_extractors,
    chosen_rewards,
    difference_rows,
    prompt_clusters,
    result_rows,
    score_target,
    tag_rows,
)
from fmg.eval.set_metrics import FeatureSet, ReferenceSet, SetMetrics, metric_rows, references
from fmg.inference.generator import Generator
from fmg.inference.loading import TORCH, load_target
from fmg.inference.target import Target, TargetLike, resolve_target
from fmg.inference.torch_backend import pick_device
from fmg.progress import watching
from fmg.rewards.base import build_rewards, check_prompts
from fmg.rewards.functions import Rewards, measured_names

BASE = "base"
# The reference pictures of a world are the same for every evaluation.


@python_call
@torch_as_new()
def evaluate(
    target: TargetLike = None,
    *,
    against: TargetLike = None,
    prompts: str | None = None,
    rewards: Rewards | None = None,
    options: Mapping[str, Mapping[str, object]] | None = None,
    extractors: str | Sequence[str] = (),
    reference: str | PathLike[str] | None = None,
    steps: int | Sequence[int] | None = None,
    grid: str | None = None,
    resolution: int | None = None,
    num: int = 1000,
    seed: int = 0,
    backend: str = TORCH,
    device: str = "auto",
    dtype: str = "fp32",
    batch_size: int | None = None,
    dump: tuple[str, str | Path] | None = None,
    report: str | Path | None = None,
    allow_code: bool = False,
    observer: Observer | None = None,
    progress: bool | None = None,
) -> EvalReport:
    """Generates `num` images with a target's native few-step sampler and scores them.

    Args:
        target: model name or run folder; None is the newest run.
        against: a second target, or `base` for the target's own model without its adapter; differences are paired image
            by image.
        prompts: prompt set by name or file; None takes the recipe's evaluation set.
        rewards: names (`python:module:fn` allowed) or functions, as in `train` but without weights; None takes the
            recipe's own and its evaluation rewards.
        options: options of rewards and extractors by name.
        extractors: feature extractors by name; each adds metrics of the whole set.
        reference: what Fréchet distance, precision and recall compare with: a folder of images, or `world` for
            renderings of the prompts of an embedded world; None leaves them out.
        steps: numbers of sampling steps (NFE) to compare; None takes the recipe's.
        grid: time grid by name; None takes the target's recipe's, for both targets.
        resolution: image side in pixels, for models with a choice; None takes the target's recipe's.
        num: images for each number of steps.
        seed: evaluation seed.
        backend: what generates the images: `torch`, or `torch-compile`.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `fp32` or `bf16`.
        batch_size: images per forward pass; None takes the default.
        dump: format (`geneval`) and a new folder for the images of the target.
        report: where a page with images and its JSON go: a `.html` file, or a folder for `report.html`.
        allow_code: whether rewards that the recipe of a run names as code may run; `rewards` given here always may.
        observer: receives `StageProgress` and `Notice` events.
        progress: whether progress is shown, as in `train`.

    Raises:
        UsageError: unknown target, reward, prompt set, extractor or grid, a number out of range, a file in the way.
    """
    if num < 1:
        raise UsageError(f"The number of images is {num}", "Set --num to at least 1.")
    names, functions = measured_names(rewards)
    with watching(observer, progress) as told:
        first = resolve_target(target, allow_code=allow_code or bool(names), observer=told)
        other = _other(first, against, told)
    if resolution is not None:
        first, other = _sized(first, resolution), other and _sized(other, resolution)
    prompt_set = load_prompts(prompts or first.recipe.eval.prompts)
    given = dict(options or {})
    features = chosen_extractors([extractors] if isinstance(extractors, str) else extractors, given)
    scorers = build_rewards(chosen_rewards(names, first.recipe.measured_rewards, given, taken=features), functions)
    eval_set = EvalSet.make(prompt_set, num, seed)
    for name, reward in scorers.items():
        check_prompts(name, reward, eval_set.prompts)
    sweep = (steps,) if isinstance(steps, int) else tuple(steps or (first.recipe.rollout.steps,))
    _check_dump(dump, sweep)
    page = None if report is None else check_report(report)
    compared = None if reference is None else str(reference)
    real = references(compared, features, pick_device(device), prompt_set, eval_set.prompts)
    with watching(observer, progress) as told, ExitStack() as stack:
        plan = _Plan(scorers, features, real, eval_set, sweep, grid or first.recipe.rollout.grid, told)
        sink = [] if dump is None else [stack.enter_context(geneval_dump(Path(dump[1]), eval_set.entries))]
        load = partial(load_target, backend=backend, device=device, dtype=dtype, batch_size=batch_size)
        runs = [
            plan.measure(found, load, sinks=sinks, gallery=page is not None)
            for found, sinks in ((first, sink), (other, []))
            if found is not None
        ]
    set_name = prompts or first.recipe.eval.prompts.name
    result = _compare([plan.report(run, set_name, seed) for run in runs], runs)
    if page is not None:
        write_report(page, result, [{steps: m.gallery for steps, m in run.measured.items()} for run in runs])
    return result


def _other(first: Target, against: TargetLike, observer: Observer) -> Target | None:
    if against is None:
        return None
    # only the rewards of the first target are measured, so code that the other's recipe names stays unused
    return (
        first.base() if against == BASE else resolve_target(against, allow_code=True, other=(BASE,), observer=observer)
    )


def _sized(target: Target, resolution: int) -> Target:
    """The target with images of another size.

    Raises:
        UsageError: its images have one size, or the model has no such size.
    """
    if "resolution" not in type(target.recipe.model.config).model_fields:
        raise UsageError(f"The images of '{target.label}' have one size", "Leave out --resolution.")
    recipe = target.recipe.with_({"model.resolution": resolution})
    return replace(target, label=f"{target.label} at {resolution} px", recipe=recipe)


def _check_dump(dump: tuple[str, str | Path] | None, sweep: Sequence[int]) -> None:
    if dump is None:
        return
    if dump[0] not in DUMP_FORMATS:
        raise UsageError(f"There is no dump format '{dump[0]}'", f"Known: {', '.join(DUMP_FORMATS)}.")
    if len(sweep) > 1:
        raise UsageError("A dump contains images of one number of steps", "Give one number to --steps.")


@dataclass(frozen=True)
class _Measured:
    """The measurements of one target with one number of steps."""

    scores: Scores
    metrics: Mapping[str, SetMetrics]
    gallery: ImageGallery | None


@dataclass(frozen=True)
class _Run:
    target: Target
    measured: Mapping[int, _Measured]


@dataclass(frozen=True)
class _Plan:
    rewards: Mapping[str, Reward]
    extractors: Mapping[str, FeatureExtractor]
    references: Mapping[str, ReferenceSet]
    eval_set: EvalSet
    sweep: tuple[int, ...]
    grid: str | tuple[float, ...]
    observer: Observer

    def measure(
        self,
        target: Target,
        load: Callable[[Target], Generator],
        *,
        sinks: Sequence[Sink],
        gallery: bool,
    ) -> _Run:
        """Generates and scores all images of a target, at every number of steps."""
        self.observer(StageProgress("loading", 0, 0, target.label))
        generator = load(target)
        tell_of_cuts(generator.backend, self.eval_set.prompts, self.observer)
        for count in self.sweep:
            generator.times(count, self.grid)
        groups = prompt_clusters(self.eval_set.prompts)
        measured = {}
        for count in self.sweep:
            progress = partial(self._progress, f"{target.label}, {counted(count, 'step')}")
            sets = {name: FeatureSet(extractor, groups) for name, extractor in self.extractors.items()}
            shown = ImageGallery(self.eval_set, (next(iter(self.rewards)), "total")) if gallery else None
            watching: list[Sink] = [*sinks, *(found.sink for found in sets.values()), *([shown] if shown else [])]
            scores = score_target(
                generator,
                self.rewards,
                self.eval_set,
                steps=count,
                grid=self.grid,
                progress=progress,
                sinks=watching,
            )
            metrics = {name: SetMetrics.of(found, self.references.get(name)) for name, found in sets.items()}
            measured[count] = _Measured(scores, metrics, shown)
        if any(not len(m.spread) for found in measured.values() for m in found.metrics.values()):
            text = "Every prompt has a single image, so there is no diversity within prompts: raise --num."
            self.observer(Notice("warning", text))
        return _Run(target, measured)

    def report(self, run: _Run, prompts: str, seed: int) -> EvalReport:
        return EvalReport(
            target=run.target.label,
            adapter=str(run.target.adapter) if run.target.adapter else None,
            seed=seed,
            num=len(self.eval_set.prompts),
            grid=self.grid if isinstance(self.grid, str) else "explicit",
            prompts=prompts,
            results=tuple(row for steps, m in run.measured.items() for row in result_rows(steps, m.scores)),
            tags=tuple(row for steps, m in run.measured.items() for row in tag_rows(steps, m.scores)),
            metrics=tuple(row for steps, m in run.measured.items() for row in metric_rows(steps, m.metrics)),
            against=(),
            differences=(),
            metric_differences=(),
        )

    def _progress(self, stage: str, done: int, total: int) -> None:
        self.observer(StageProgress(stage, done, total))


def _compare(reports: Sequence[EvalReport], runs: Sequence[_Run]) -> EvalReport:
    if len(reports) == 1:
        return reports[0]
    ours, theirs = (run.measured for run in runs)
    return replace(
        reports[0],
        against=(reports[1],),
        differences=tuple(
            row for steps, m in ours.items() for row in difference_rows(steps, m.scores, theirs[steps].scores)
        ),
        metric_differences=tuple(
            row
            for steps, m in ours.items()
            for name, metrics in m.metrics.items()
            for row in metrics.difference(theirs[steps].metrics[name], steps, name)
        ),
    )
