"""Scores of images: which rewards and images, batch by batch, and the resulting rows of a report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fmg.core import metric_keys as keys
from fmg.core.errors import RewardError, UsageError, suggestion
from fmg.core.prompt import Prompt
from fmg.core.protocols import FeatureExtractor, PromptSet, Reward
from fmg.eval.intervals import bootstrap_mean
from fmg.eval.results import MEAN_OF_TAGS, Difference, Result, TagResult
from fmg.inference.generator import Generator
from fmg.recipe.sections import RewardRef
from fmg.registry import feature_extractors
from fmg.registry import rewards as reward_registry
from fmg.rewards.base import reward_refs
from fmg.rl.keyed_noise import sub_seed

CHUNK = 256


@dataclass(frozen=True)
class Scores:
    """Scores of `n` images: `parts[(reward, part)]` is an (n,) array; `tags` and `prompts` have one entry per image."""

    parts: Mapping[tuple[str, str], NDArray[np.float64]]
    prompts: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class EvalSet:
    """The (prompt, seed) pairs of an evaluation: the same for every target, so differences are paired."""

    entries: tuple[Prompt, ...]
    seeds: tuple[int, ...]

    @staticmethod
    def make(prompt_set: PromptSet, num: int, seed: int, *, selection: bool = False) -> EvalSet:
        """`num` images that cycle through the prompt set in order, or are spread evenly over it when they are fewer.

        With `selection`, the seeds differ from those of every evaluation: a checkpoint must not be selected on the
        noise it is then judged on.
        """
        size = len(prompt_set)
        chosen = tuple(prompt_set[i * size // num if num < size else i % size] for i in range(num))
        seeds = tuple(sub_seed(seed, i) for i in range(num))
        if selection:
            seeds = tuple(-1 - value for value in seeds)
        return EvalSet(chosen, seeds)

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(prompt.text for prompt in self.entries)

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(prompt.tag for prompt in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def select(self, rows: Int[Tensor, " k"]) -> EvalSet:
        """Some of the pairs, in the given order."""
        chosen = rows.tolist()
        return EvalSet(tuple(self.entries[i] for i in chosen), tuple(self.seeds[i] for i in chosen))


Parts = Mapping[tuple[str, str], NDArray[np.float64]]
"""Scores by reward and part."""

Options = Mapping[str, Mapping[str, object]]
"""Options of rewards and extractors by name."""

Sink = Callable[[Float[Tensor, "b 3 h w"], Parts], None]
"""Receives the images of an evaluation: batch by batch, in order, with their scores."""


def score_images(
    rewards: Mapping[str, Reward], images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]
) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Every part of every reward; the reward's own total has the part name `total`."""
    scores: dict[tuple[str, str], NDArray[np.float64]] = {}
    for name, reward in rewards.items():
        output = reward(images, prompts)
        scores[name, "total"] = output.total.double().cpu().numpy()
        for part, values in output.parts.items():
            scores[name, part] = values.double().cpu().numpy()
    return scores


class ScoreCollector:
    """The scores of one batch of images after another."""

    def __init__(self) -> None:
        self._batches: defaultdict[tuple[str, str], list[NDArray[np.float64]]] = defaultdict(list)
        self._count = 0

    def add(self, scores: Parts) -> None:
        """Adds the scores of the next batch.

        Raises:
            RewardError: a reward reports different parts than for earlier batches.
        """
        other = next(iter(sorted(self._batches.keys() ^ scores.keys())), None) if self._count else None
        if other is not None:
            reward, part = other
            raise RewardError(
                f"The reward '{reward}' reports the part '{part}' for some batches of images but not for others",
                "Return the same parts for every batch.",
            )
        for key, values in scores.items():
            self._batches[key].append(values)
        self._count += 1

    def parts(self) -> Parts:
        return {key: np.concatenate(values) for key, values in self._batches.items()}


def score_target(
    generator: Generator,
    rewards: Mapping[str, Reward],
    eval_set: EvalSet,
    *,
    steps: int | None,
    grid: str | Sequence[float] | None,
    progress: Callable[[int, int], None],
    sinks: Sequence[Sink] = (),
) -> Scores:
    """Generates and scores all images of `eval_set` with one number of steps, on the device of the generator.

    Raises:
        NotFiniteError: an image has values that are not finite.
        RewardError: a reward fails, or reports different parts for different images.
    """
    collected = ScoreCollector()
    texts = eval_set.prompts
    total = len(texts)
    for start in range(0, total, CHUNK):
        rows = slice(start, start + CHUNK)
        generated = generator.generate(texts[rows], eval_set.seeds[rows], steps=steps, grid=grid, progress=False)
        generated.check_finite()
        images = generated.images.to(generator.backend.device)
        scores = score_images(rewards, images, texts[rows])
        collected.add(scores)
        for sink in sinks:
            sink(images, scores)
        progress(min(start + CHUNK, total), total)
    return Scores(collected.parts(), texts, eval_set.tags)


def means(scores: Scores) -> dict[str, float]:
    """Log keys `eval/<reward>_<part>_mean`; the total of a reward is `eval/<reward>_mean`.

    Each has a standard error, `..._se`, for new images of the same prompts; NaN for a single image.
    """
    out: dict[str, float] = {}
    for (reward, part), values in scores.parts.items():
        name = reward if part == "total" else f"{reward}_{part}"
        mean = f"{keys.EVAL}{name}{keys.MEAN}"
        out |= {mean: float(values.mean()), keys.error_of(mean): standard_error(values)}
    return out


def standard_error(values: NDArray[np.float64]) -> float:
    """The standard error of the mean of `values`; NaN for a single value, which says nothing about the spread."""
    return float(values.std() / np.sqrt(len(values))) if len(values) > 1 else math.nan


def prompt_clusters(prompts: Iterable[str]) -> NDArray[np.int64]:
    """An integer label for each prompt: images of one prompt share their label."""
    _, labels = np.unique(np.asarray(list(prompts)), return_inverse=True)
    return labels.astype(np.int64)


def result_rows(steps: int, scores: Scores) -> Iterator[Result]:
    """The mean of every part of every reward."""
    clusters = prompt_clusters(scores.prompts)
    for (reward, part), values in scores.parts.items():
        yield Result(steps, reward, part, float(values.mean()), float(values.std()), interval(values, clusters))


def difference_rows(steps: int, ours: Scores, theirs: Scores) -> Iterator[Difference]:
    """Paired differences of the same images."""
    clusters = prompt_clusters(ours.prompts)
    for key, values in ours.parts.items():
        delta = values - theirs.parts[key]
        yield Difference(steps, *key, float(delta.mean()), interval(delta, clusters))


def tag_rows(steps: int, scores: Scores) -> Iterator[TagResult]:
    """The mean of every part for each tag, and the mean over tags; nothing when all prompts have the same tag.

    Tags are independent, so the half-width of the mean over tags is the root of the sum of their squares.
    """
    tags = np.asarray(scores.tags)
    names = sorted(set(scores.tags))
    if len(names) < 2:
        return
    clusters = prompt_clusters(scores.prompts)
    rows = {tag: np.flatnonzero(tags == tag) for tag in names}
    for (reward, part), values in scores.parts.items():
        means, halves = [], []
        for tag in names:
            chosen = values[rows[tag]]
            ci95 = interval(chosen, clusters[rows[tag]])
            yield TagResult(steps, reward, part, tag, len(chosen), float(chosen.mean()), ci95)
            means.append(float(chosen.mean()))
            halves.append((ci95[1] - ci95[0]) / 2)
        mean, half = float(np.mean(means)), float(np.linalg.norm(halves)) / len(names)
        yield TagResult(steps, reward, part, MEAN_OF_TAGS, len(values), mean, (mean - half, mean + half))


def interval(values: NDArray[np.float64], clusters: NDArray[np.int64]) -> tuple[float, float]:
    """The interval of a mean, over prompts; with a single prompt, over its images, the only evidence there is."""
    return bootstrap_mean(values, clusters if np.ptp(clusters) > 0 else None)


def chosen_extractors(names: Sequence[str], options: Options) -> dict[str, FeatureExtractor]:
    """Extractors by name.

    Raises:
        UsageError: for an unknown name or option, or one given twice.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"The feature extractor '{twice}' is given twice", "Give each one once.")
    return {name: feature_extractors.build(name, options.get(name)) for name in names}


def chosen_rewards(
    names: Sequence[str | Mapping[str, object]] | None,
    own: Sequence[RewardRef],
    options: Options,
    *,
    taken: Collection[str],
) -> list[RewardRef]:
    """The rewards called `names`, or `own`, with `options` replacing their own.

    Args:
        names: given by the user, by name or as entries of a recipe; None takes `own`.
        own: rewards of a recipe.
        options: options by name.
        taken: other names that options may belong to.

    Raises:
        UsageError: for an unknown name or option, or options of a reward that is not measured.
    """
    found = reward_refs(names, options) if names else [_with(ref, options.get(ref.label, {})) for ref in own]
    known = [*(ref.label for ref in found), *(ref.name for ref in found), *taken]
    for name in options:
        if name not in known:
            raise UsageError(f"--set names '{name}', which is not measured", suggestion(name, known))
    return found


def _with(reference: RewardRef, options: Mapping[str, object]) -> RewardRef:
    if not options:
        return reference
    merged = {**reference.config.model_dump(), **options}
    return RewardRef(name=reference.name, config=reward_registry.config(reference.name, merged))
