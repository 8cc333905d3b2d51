"""Whole pictures and their rewards: the same prompts and seeds through torch and through an artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmg.core.protocols import Reward
from fmg.eval.intervals import bootstrap_mean
from fmg.eval.scoring import CHUNK, EvalSet, prompt_clusters, score_images
from fmg.inference import Generator
from fmg.inference.artifact.manifest import Precision
from fmg.inference.parity import Difference, ImageParity

REWARD_ALLOWED: Mapping[Precision, float] = {"fp32": 0.005, "fp16": 0.02, "bf16": 0.02, "int8": 0.02}
"""Half-width of the band that the 95 % interval of the paired reward gap has to lie in."""
LEAST_IMAGES = 500
"""Fewer prove nothing about a reward: where a rule gives both sides equal scores, the interval has no width at all."""


@dataclass(frozen=True)
class RewardGap:
    """Artifact minus torch on the same prompts and seeds, with its 95 % bootstrap interval over prompts."""

    reward: str
    part: str
    torch: float
    artifact: float
    gap: float
    ci95: tuple[float, float]
    images: int

    def passed(self, allowed: float) -> bool:
        """Whether the whole interval lies within `allowed` of zero; with too few images to say it does not."""
        return not self.problem(allowed)

    def problem(self, allowed: float) -> str:
        """Why it does not pass; empty when it does."""
        low, high = self.ci95
        if not np.isfinite([self.torch, self.artifact]).all():
            return "a reward is not finite"
        if self.images < LEAST_IMAGES:
            return f"too few images to say: {self.images} of {LEAST_IMAGES}"
        if -allowed <= low and high <= allowed:
            return ""
        inside = -allowed <= self.gap <= allowed
        return "the interval is too wide to say: use more images" if inside else "the rewards differ"


@dataclass(frozen=True)
class Pictures:
    """What both sides drew: differences of the images, and the gap of every part of every reward."""

    images: ImageParity
    gaps: tuple[RewardGap, ...]


def compare(
    reference: Generator,
    candidate: Generator,
    eval_set: EvalSet,
    rewards: Mapping[str, Reward],
    *,
    progress: Callable[[int, int], None],
) -> Pictures:
    """Draws all images of `eval_set` on both sides, compares them and scores them.

    Args:
        reference: torch.
        candidate: the artifact.
        eval_set: prompts and seeds.
        rewards: by label; none skips the scoring.
        progress: called with (done, total).
    """
    total = len(eval_set.prompts)
    difference = Difference()
    scores: dict[tuple[str, str], tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]] = {}
    for start in range(0, total, CHUNK):
        rows = slice(start, start + CHUNK)
        prompts, seeds = eval_set.prompts[rows], eval_set.seeds[rows]
        sides = [generator.generate(prompts, seeds, progress=False) for generator in (reference, candidate)]
        difference.add(sides[1].image_array, sides[0].image_array)
        if difference.not_finite:
            # no reward scores such images, and they fail by themselves
            rewards, scores = {}, {}
        scored = [score_images(rewards, side.images, prompts) for side in sides]
        for key in scored[0]:
            ours = scores.setdefault(key, ([], []))
            for column, side in zip(ours, scored, strict=True):
                column.append(side[key])
        progress(min(start + CHUNK, total), total)
    clusters = prompt_clusters(eval_set.prompts)
    gaps = [_gap(key, np.concatenate(a), np.concatenate(b), clusters) for key, (a, b) in scores.items()]
    return Pictures(difference.result(), tuple(gaps))


def _gap(
    key: tuple[str, str], torch_: NDArray[np.float64], artifact: NDArray[np.float64], clusters: NDArray[np.int64]
) -> RewardGap:
    delta = artifact - torch_
    interval = bootstrap_mean(delta, clusters if np.ptp(clusters) > 0 else None)
    return RewardGap(*key, float(torch_.mean()), float(artifact.mean()), float(delta.mean()), interval, len(delta))
