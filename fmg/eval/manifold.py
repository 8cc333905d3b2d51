"""Precision and recall of a generator by nearest neighbours (Kynkäänniemi et al., arXiv 1904.06991, eq. 1 and 2).

Precision: the share of generated images inside the manifold of the real ones, the union of balls around each image that
reach its k-th nearest neighbour. Recall: the share of real images inside the manifold of the generated ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

NEIGHBOURS = 3
"""k of the paper."""
MAX_IMAGES = 10_000
"""Larger sets are thinned evenly to this size, so that distances fit in memory."""


@dataclass(frozen=True)
class Manifolds:
    """Squared distances among generated features, and between generated and real ones; radii of the real ones."""

    among: NDArray[np.float32]
    across: NDArray[np.float32]
    real_radii: NDArray[np.float32]

    def precision(self, rows: Int[np.ndarray, " k"]) -> float:
        """Of the generated images in `rows`."""
        return float((self.across[rows] <= self.real_radii).any(1).mean())

    def recall(self, rows: Int[np.ndarray, " k"]) -> float:
        """Of the real images, by the manifold of the generated images in `rows`."""
        radii = _radii(self.among[np.ix_(rows, rows)])
        return float((self.across[rows] <= radii[:, None]).any(0).mean())


def manifolds(generated: Float[np.ndarray, "n d"], real: Float[np.ndarray, "m d"]) -> Manifolds:
    """Distances of two sets of features.

    Raises:
        ValueError: when a set has no more than `NEIGHBOURS` images.
    """
    if min(len(generated), len(real)) <= NEIGHBOURS:
        raise ValueError(f"a manifold needs more than {NEIGHBOURS} images")
    return Manifolds(_squared(generated, generated), _squared(generated, real), _radii(_squared(real, real)))


def thinned(count: int) -> Int[np.ndarray, " k"]:
    """Rows of a set of `count` images to use: all, or `MAX_IMAGES` of them evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_IMAGES)).round().astype(np.int64))


def _squared(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "m d"]) -> NDArray[np.float32]:
    # around a common centre, so that the expansion of the square does not cancel
    centre = second.mean(0, dtype=np.float64)
    a, b = first - centre, second - centre
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return cast("NDArray[np.float32]", np.maximum(squares, 0).astype(np.float32))


def _radii(squares: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared distance of each image to its k-th nearest other one: entry 0 of a sorted row is the image itself."""
    return np.partition(squares, NEIGHBOURS, axis=1)[:, NEIGHBOURS]
