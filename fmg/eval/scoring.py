"""Draws the images of an evaluation and scores them, batch by batch, so that memory does not grow with their number."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fmg.core import metric_keys as keys
from fmg.core.errors import RewardError
from fmg.core.prompt import Prompt
from fmg.core.protocols import PromptSet, Reward
from fmg.inference.generator import Generator

# Seeds of evaluation image i are derived from the evaluation seed and i; the factor keeps two evaluation seeds apart.
_SEED_STRIDE = 1_000_003
CHUNK = 256


@dataclass(frozen=True)
class Scores:
    """Scores of `n` images: `parts[(reward, part)]` is an (n,) array; `tags` and `prompts` have one entry an image."""

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
        """`num` images that go round the prompt set in order, or are spread evenly over it when they are fewer.

        With `selection`, the seeds are others than those of any evaluation: a checkpoint must not be chosen on the
        noise on which it is then judged.
        """
        size = len(prompt_set)
        chosen = tuple(prompt_set[i * size // num if num < size else i % size] for i in range(num))
        seeds = tuple(seed * _SEED_STRIDE + i for i in range(num))
        if selection:
            seeds = tuple(-1 - value for value in seeds)
        return EvalSet(chosen, seeds)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Text of each prompt."""
        return tuple(prompt.text for prompt in self.entries)

    @property
    def tags(self) -> tuple[str, ...]:
        """Tag of each prompt."""
        return tuple(prompt.tag for prompt in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def select(self, rows: Int[Tensor, " k"]) -> EvalSet:
        """Some of the pairs, in the given order."""
        chosen = rows.tolist()
        return EvalSet(tuple(self.entries[i] for i in chosen), tuple(self.seeds[i] for i in chosen))


Parts = Mapping[tuple[str, str], NDArray[np.float64]]
"""Scores by reward and part."""

Sink = Callable[[Float[Tensor, "b 3 h w"], Parts], None]
"""What else looks at the images of an evaluation: batch by batch, in order, with their scores."""


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


class Collected:
    """The scores of one batch of images after another."""

    def __init__(self) -> None:
        self._batches: defaultdict[tuple[str, str], list[NDArray[np.float64]]] = defaultdict(list)
        self._count = 0

    def add(self, scores: Parts) -> None:
        """Takes those of the next batch.

        Raises:
            RewardError: when a reward reports other parts than for the batches before.
        """
        other = next(iter(sorted(self._batches.keys() ^ scores.keys())), None) if self._count else None
        if other is not None:
            reward, part = other
            raise RewardError(
                f"The reward '{reward}' reports the part '{part}' for some batches of images and not for others",
                "Return the same parts for every batch.",
            )
        for key, values in scores.items():
            self._batches[key].append(values)
        self._count += 1

    def parts(self) -> Parts:
        """Those of all images."""
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
    """Draws and scores all images of `eval_set` with one number of steps, on the device of the generator.

    Raises:
        NotFiniteError: an image holds values that are not finite.
        RewardError: when a reward fails, or reports other parts for some images than for others.
    """
    collected = Collected()
    texts = eval_set.prompts
    total = len(texts)
    for start in range(0, total, CHUNK):
        rows = slice(start, start + CHUNK)
        drawn = generator.generate(texts[rows], eval_set.seeds[rows], steps=steps, grid=grid, progress=False)
        drawn.check_finite()
        images = drawn.images.to(generator.backend.device)
        scores = score_images(rewards, images, texts[rows])
        collected.add(scores)
        for sink in sinks:
            sink(images, scores)
        progress(min(start + CHUNK, total), total)
    return Scores(collected.parts(), texts, eval_set.tags)


def means(scores: Scores, prefix: str = "eval") -> dict[str, float]:
    """Log keys `<prefix>/<reward>_<part>_mean`; the total of a reward is `<prefix>/<reward>_mean`.

    Each has a standard error, `..._se`, for new images of the same prompts; NaN for a single image.
    """
    out: dict[str, float] = {}
    for (reward, part), values in scores.parts.items():
        name = reward if part == "total" else f"{reward}_{part}"
        mean = f"{prefix}/{name}{keys.MEAN}"
        out |= {mean: float(values.mean()), keys.error_of(mean): standard_error(values)}
    return out


def standard_error(values: NDArray[np.float64]) -> float:
    """Of the mean of `values`; NaN for a single one, which does not tell how much another would differ."""
    return float(values.std() / np.sqrt(len(values))) if len(values) > 1 else math.nan


def prompt_clusters(prompts: Iterable[str]) -> NDArray[np.int64]:
    """An integer label for each prompt: images of one prompt share their label."""
    _, labels = np.unique(np.asarray(list(prompts)), return_inverse=True)
    return labels.astype(np.int64)
