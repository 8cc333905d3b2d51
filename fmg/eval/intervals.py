"""Intervals: of means by bootstrap, and of statistics of whole sets by random halves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmg.data.run_metrics import TWO_SIDED_95

RESAMPLES = 2000
HALVES = 60
_SEED = 0
# A resample matrix larger than this is built in pieces, so that 100,000 images do not need gigabytes.
_PIECE = 4_000_000


def bootstrap_mean(values: NDArray[np.float64], clusters: NDArray[np.int64] | None = None) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron and Tibshirani, 1993, chapter 13).

    Args:
        values: (n,) scores, or paired differences.
        clusters: (n,) labels of values that are not independent, such as images of one prompt; whole clusters are
            then resampled. None resamples single values.

    Returns:
        Lower and upper bound. With one cluster the interval is unbounded: (-inf, inf).
    """
    if values.size == 0:
        raise ValueError("an interval needs at least one value")
    labels = np.arange(values.size) if clusters is None else clusters
    _, index = np.unique(labels, return_inverse=True)
    sums: NDArray[np.float64] = np.bincount(index, weights=values).astype(np.float64)
    counts: NDArray[np.float64] = np.bincount(index).astype(np.float64)
    n = sums.size
    if n == 1:
        return (-np.inf, np.inf)
    rng = np.random.default_rng(_SEED)
    rows = max(1, _PIECE // n)
    means: list[NDArray[np.float64]] = []
    for start in range(0, RESAMPLES, rows):
        picks = rng.integers(0, n, size=(min(rows, RESAMPLES - start), n))
        means.append(sums[picks].sum(1) / counts[picks].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Estimate:
    """A statistic of a whole set of images: its value, a 95 % interval, and its mean over random halves.

    Attributes:
        value: value on the whole set.
        ci95: `value` -+ 1.96 standard errors; unbounded for a set that cannot be halved.
        halved: mean over random halves of the set, None for one that cannot be halved. A statistic with a bias of order
            1/n is about `2 * value - halved` on an infinite set (Chong and Forsyth, arXiv 1911.07023).
    """

    value: float
    ci95: tuple[float, float]
    halved: float | None

    def extrapolated(self) -> Estimate | None:
        """The estimate with its bias of order 1/n removed; the interval keeps its width. None without halves."""
        if self.halved is None:
            return None
        shift = self.value - self.halved
        return Estimate(self.value + shift, (self.ci95[0] + shift, self.ci95[1] + shift), self.value + shift)


def subset_estimate(statistic: Callable[[NDArray[np.int64]], float], count: int, *, least: int = 1) -> Estimate:
    """A statistic of a whole set with an interval from random halves without replacement (the delete-half jackknife).

    Resampling with replacement would repeat images, which biases distances between sets and nearest neighbours. The
    spread of a statistic over halves estimates its standard error on the whole set (Shao and Wu, Annals of Statistics
    17(3), 1989). Images are halved, not prompts: a set is compared with a reference for these prompts, and half of the
    prompts would be another mixture. The interval is therefore that of new images of the same prompts.

    Args:
        statistic: computes the statistic of the images in the given rows; called with all rows, and
            `HALVES` times with half of them.
        count: images.
        least: images that the statistic needs.
    """
    value = statistic(np.arange(count))
    size = count // 2
    if size < least:
        return Estimate(value, (-np.inf, np.inf), None)
    rng = np.random.default_rng(_SEED)
    halves = np.asarray([statistic(np.sort(rng.permutation(count)[:size])) for _ in range(HALVES)])
    # 1 when the count is even
    error = float(TWO_SIDED_95 * halves.std(ddof=1) * np.sqrt(size / (count - size)))
    return Estimate(value, (value - error, value + error), float(halves.mean()))
