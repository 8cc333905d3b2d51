"""Bootstrap intervals of means."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
# A resample matrix larger than this is built in pieces, so that 100,000 images do not need gigabytes.
_PIECE = 4_000_000


def bootstrap_mean(
    values: NDArray[np.float64], clusters: NDArray[np.int64] | None = None, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani, 1993, chapter 13).

    Args:
        values: (n,) scores, or paired differences.
        clusters: (n,) labels of values that are not independent, such as images of one prompt; whole clusters are
            then resampled. None resamples single values.
        level: coverage in (0, 1).
        seed: seed of the resampling.

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
    rng = np.random.default_rng(seed)
    rows = max(1, _PIECE // n)
    means: list[NDArray[np.float64]] = []
    for start in range(0, RESAMPLES, rows):
        picks = rng.integers(0, n, size=(min(rows, RESAMPLES - start), n))
        means.append(sums[picks].sum(1) / counts[picks].sum(1))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
