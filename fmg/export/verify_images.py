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

IMAGES_ALLOWED: Mapping[Precision, float] = {"fp32": 1e-4}
"""Largest absolute difference of one value in [0, 1] in 99 of 100 images; other precisions are judged by their PSNR."""
LEVEL = 1 / 255
"""What no value of any fp32 image may differ by: one level of an 8-bit picture. Few-step maps are stiff in places, and
there one image in hundreds amplifies rounding, as it does between two batch sizes in torch."""
PSNR_ALLOWED: Mapping[Precision, float] = {"bf16": 25.0, "fp16": 30.0, "int8": 20.0}
"""Least peak signal-to-noise ratio over all images together, in dB."""
REWARD_ALLOWED: Mapping[Precision, float] = {"fp32": 0.005, "fp16": 0.02, "bf16": 0.02, "int8": 0.02}
"""Half-width of the band that the 95 % interval of the paired reward gap has to lie in."""
LEAST_IMAGES = 500
"""Fewer prove nothing about a reward: where a rule gives both sides equal scores, the interval has no width at all."""


@dataclass(frozen=True)
class ImageParity:
    """How far images are apart.

    Attributes:
        max_abs: largest difference of a value in [0, 1].
        p99_abs: 99th percentile over images of the largest difference in an image.
        mean_abs: mean difference.
        psnr: peak signal-to-noise ratio of all images together, dB.
        images: how many.
        not_finite: images that hold NaN or an infinite value on either side; the rest is then NaN.
    """

    max_abs: float
    p99_abs: float
    mean_abs: float
    psnr: float
    images: int
    not_finite: int

    def passed(self, precision: Precision) -> bool:
        """Whether the differences are those of rounding in this precision."""
        return not self.problem(precision)

    def problem(self, precision: Precision) -> str:
        """Why they do not pass; empty when they do."""
        if self.not_finite:
            return f"{self.not_finite} of {self.images} images hold values that are not finite"
        return "" if self._close(precision) else f"allowed for {precision}: {image_bound(precision)}"

    def _close(self, precision: Precision) -> bool:
        if precision in IMAGES_ALLOWED:
            return self.p99_abs <= IMAGES_ALLOWED[precision] and self.max_abs <= LEVEL
        return self.psnr >= PSNR_ALLOWED[precision]


def image_bound(precision: Precision) -> str:
    """What `ImageParity.passed` asks, for people."""
    if precision in IMAGES_ALLOWED:
        return f"a difference of {IMAGES_ALLOWED[precision]:g} in 99 of 100 images, of {LEVEL:.4f} in any"
    return f"PSNR of {PSNR_ALLOWED[precision]:g} dB or more"


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
    difference = _Difference()
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


class _Difference:
    """Statistics of differences, batch by batch."""

    def __init__(self) -> None:
        self._largest: list[NDArray[np.float64]] = []
        self._values, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, images: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        difference = np.abs(images.astype(np.float64) - expected)
        self._largest.append(difference.reshape(len(images), -1).max(1))
        self._values += difference.size
        self._sum += float(difference.sum())
        self._squares += float(np.square(difference).sum())

    @property
    def not_finite(self) -> int:
        """Images with a value that is not finite on either side."""
        return sum(int((~np.isfinite(largest)).sum()) for largest in self._largest)

    def result(self) -> ImageParity:
        largest = np.concatenate(self._largest)
        p99 = float(np.quantile(largest, 0.99, method="higher"))
        mean_square = self._squares / self._values
        # 200 dB stands for images that are equal, as JSON has no infinity; a NaN stays one, which min() would not do
        psnr = float(np.minimum(200.0, -10 * np.log10(mean_square))) if mean_square else 200.0
        return ImageParity(float(largest.max()), p99, self._sum / self._values, psnr, len(largest), self.not_finite)


def _gap(
    key: tuple[str, str], torch_: NDArray[np.float64], artifact: NDArray[np.float64], clusters: NDArray[np.int64]
) -> RewardGap:
    delta = artifact - torch_
    interval = bootstrap_mean(delta, clusters if np.ptp(clusters) > 0 else None)
    return RewardGap(*key, float(torch_.mean()), float(artifact.mean()), float(delta.mean()), interval, len(delta))
