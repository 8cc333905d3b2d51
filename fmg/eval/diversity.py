"""Diversity of images as the mean distance over pairs, within prompts and over a whole set.

Both use that the sum over pairs follows from sums over images, so that no pair is ever formed and memory grows with the
number of groups, not of images.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

Vectors = Float[np.ndarray, "n d"]
Labels = Int[np.ndarray, " n"]


class GroupSpread:
    """Mean squared Euclidean distance over the pairs of each group, from images that arrive in any order.

    With the maps of a feature extractor this is the mean LPIPS-like distance within a prompt (Zhang et al., arXiv
    1801.03924, with uniform weights; as a measure of diversity: Zhu et al., arXiv 1711.11586, section 4.2).

    Running means and scatters follow Welford (Technometrics 4(3), 1962): differences of large sums would cancel.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._means: dict[int, NDArray[np.float32]] = {}
        self._scatters: dict[int, float] = {}

    def add(self, vectors: Vectors, groups: Labels) -> None:
        """Takes more images: their feature vectors and the groups that they belong to."""
        for vector, label in zip(vectors, groups.tolist(), strict=True):
            count = self._counts.get(label, 0) + 1
            mean = self._means.setdefault(label, np.zeros(vector.shape, dtype=np.float32))
            before = vector - mean
            mean += before / count
            after = vector - mean
            self._counts[label] = count
            self._scatters[label] = self._scatters.get(label, 0.0) + float(np.dot(before, after.astype(np.float64)))

    def values(self) -> Float[np.ndarray, " groups"]:
        """One value for each group with two images or more, by rising label; empty when there is none."""
        known = sorted(label for label, count in self._counts.items() if count > 1)
        return np.asarray([2 * self._scatters[g] / (self._counts[g] - 1) for g in known], dtype=np.float64)


def within_groups(vectors: Vectors, groups: Labels) -> Float[np.ndarray, " groups"]:
    """Mean squared Euclidean distance over the pairs of each group with two images or more, by rising label.

    Args:
        vectors: one feature vector an image, such as the maps of a feature extractor, in whose unit the answer is.
        groups: the prompt or rollout group of each image.
    """
    spread = GroupSpread()
    spread.add(vectors, groups)
    return spread.values()


def unit(vectors: Vectors) -> Float[np.ndarray, "n d"]:
    """Vectors scaled to length 1, fp64; half their squared distance is the cosine distance."""
    exact = vectors.astype(np.float64)
    scaled: NDArray[np.float64] = exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12)
    return scaled


def cosine_diversity(units: Vectors) -> float:
    """Mean cosine distance over all pairs of unit vectors: `(n - |sum u|^2 / n) / (n - 1)`.

    Raises:
        ValueError: for fewer than two vectors.
    """
    n = len(units)
    if n < 2:
        raise ValueError("a pairwise distance needs two vectors")
    return float((n - np.square(units.sum(0)).sum() / n) / (n - 1))
