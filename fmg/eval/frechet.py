"""Fréchet distance between the Gaussians that fit two sets of features (Heusel et al., arXiv 1706.08500, eq. 6).

`|m_1 - m_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)`, all in fp64. The last trace is the nuclear norm of
`F_1' F_2` for any factors `S_i = F_i F_i'`: singular values keep the precision that eigenvalues of the product lose
where a covariance is singular, as it is with fewer images than features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray


@dataclass(frozen=True)
class Fit:
    """A Gaussian fitted to features: mean (d,), and a factor (d, r) of the unbiased covariance."""

    mean: NDArray[np.float64]
    factor: NDArray[np.float64]

    @property
    def trace(self) -> float:
        """Trace of the covariance."""
        return float(np.square(self.factor).sum())


def fit(features: Float[np.ndarray, "n d"]) -> Fit:
    """Mean and covariance of two or more feature vectors.

    Raises:
        ValueError: for fewer than two vectors.
    """
    n, d = features.shape
    if n < 2:
        raise ValueError("a covariance needs two vectors")
    exact = features.astype(np.float64)
    mean = exact.mean(0)
    deviations = (exact - mean) / np.sqrt(n - 1)
    return Fit(mean, deviations.T if n <= d else root(deviations.T @ deviations))


def root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The symmetric square root of a covariance by its eigenvalues; those that rounding made negative are 0."""
    values, vectors = np.linalg.eigh(covariance)
    scaled: NDArray[np.float64] = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return scaled


def frechet_distance(first: Fit, second: Fit) -> float:
    """The distance of two fits; not negative beyond rounding, which is cut at 0."""
    shift = float(np.square(first.mean - second.mean).sum())
    overlap = float(np.linalg.svd(first.factor.T @ second.factor, compute_uv=False).sum())
    return max(shift + first.trace + second.trace - 2 * overlap, 0.0)
