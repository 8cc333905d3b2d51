"""Metrics of a whole set of images: diversity, and distance to a reference set, from the features of an extractor.

The features are collected while the images are drawn and scored, so that a set is never kept as pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fmg.core.protocols import FeatureExtractor
from fmg.eval.diversity import GroupSpread, cosine_diversity, unit
from fmg.eval.frechet import Fit, fit, frechet_distance
from fmg.eval.intervals import Estimate, bootstrap_mean, subset_estimate
from fmg.eval.manifold import NEIGHBOURS, manifolds, thinned
from fmg.eval.results import Metric
from fmg.eval.scoring import Parts

FRECHET = "frechet"
_RANGES = {FRECHET: (0.0, np.inf), "precision": (0.0, 1.0), "recall": (0.0, 1.0)}
"""What a metric can be; its interval is symmetric and cut there."""

Statistic = Callable[[NDArray[np.int64]], float]
LEAST = NEIGHBOURS + 1
"""Images that a set needs for anything but diversity within prompts."""


class FeatureSet:
    """Features of one set of images, in the order in which they come.

    Args:
        extractor: what the images are seen with.
        groups: the prompt of each image as a number; images of one prompt are compared for diversity.
    """

    def __init__(self, extractor: FeatureExtractor, groups: Int[np.ndarray, " n"]) -> None:
        self._extractor = extractor
        self.groups = groups
        self._vectors: list[NDArray[np.float32]] = []
        self._spread = GroupSpread()
        self._count = 0

    def take(self, images: Float[Tensor, "b 3 h w"]) -> None:
        """Takes the next images of the set."""
        features = self._extractor(images)
        rows = slice(self._count, self._count + len(images))
        self._count = rows.stop
        self._vectors.append(features.vectors.numpy())
        self._spread.add(features.maps.numpy(), self.groups[rows])

    def sink(self, images: Float[Tensor, "b 3 h w"], scores: Parts) -> None:
        """`take`, as an evaluation calls it."""
        self.take(images)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """One row an image."""
        return np.concatenate(self._vectors)

    def spread(self) -> NDArray[np.float64]:
        """Mean distance of maps over the pairs of each prompt that has two images or more."""
        return self._spread.values()


@dataclass(frozen=True)
class Reference:
    """What a set is compared with: features of real images and the Gaussian that fits them."""

    vectors: NDArray[np.float32]
    fitted: Fit

    @staticmethod
    def of(vectors: NDArray[np.float32]) -> Reference:
        """From at least `LEAST` feature vectors."""
        return Reference(vectors, fit(vectors))


@dataclass(frozen=True)
class SetMetrics:
    """The metrics of one set of `count` images: `spread` by prompt, and statistics of any rows by name."""

    spread: NDArray[np.float64]
    statistics: Mapping[str, Statistic]
    count: int

    @staticmethod
    def of(features: FeatureSet, reference: Reference | None) -> SetMetrics:
        """Everything that can be said about `features`; without a reference, only diversity."""
        vectors = features.vectors
        units = unit(vectors)
        statistics: dict[str, Statistic] = {}
        if len(vectors) >= LEAST:
            statistics["cosine_diversity"] = lambda rows: cosine_diversity(units[rows])
            if reference is not None:
                statistics[FRECHET] = lambda rows: frechet_distance(fit(vectors[rows]), reference.fitted)
                statistics |= _manifold_statistics(vectors, reference.vectors)
        return SetMetrics(features.spread(), statistics, len(vectors))

    def rows(self, steps: int, extractor: str) -> Iterator[Metric]:
        """Each metric with its interval."""
        if len(self.spread):
            ci95 = bootstrap_mean(self.spread)
            yield Metric(steps, extractor, "diversity_within_prompts", float(self.spread.mean()), ci95)
        for name, statistic in self.statistics.items():
            low, high = _RANGES.get(name, (-np.inf, np.inf))
            for row in _rows(steps, extractor, name, subset_estimate(statistic, self.count, least=LEAST)):
                inside = (max(row.ci95[0], low), min(row.ci95[1], high)) if row.metric == name else row.ci95
                yield replace(row, ci95=inside)

    def difference(self, other: SetMetrics, steps: int, extractor: str) -> Iterator[Metric]:
        """This set minus another one of the same prompts and seeds."""
        if len(self.spread):
            delta = self.spread - other.spread
            yield Metric(steps, extractor, "diversity_within_prompts", float(delta.mean()), bootstrap_mean(delta))
        for name, ours in self.statistics.items():
            theirs = other.statistics[name]
            paired = _difference(ours, theirs)
            yield from _rows(steps, extractor, name, subset_estimate(paired, self.count, least=LEAST))


def _difference(ours: Statistic, theirs: Statistic) -> Statistic:
    return lambda rows: ours(rows) - theirs(rows)


def _rows(steps: int, extractor: str, name: str, estimate: Estimate) -> Iterator[Metric]:
    yield Metric(steps, extractor, name, estimate.value, estimate.ci95)
    # its bias falls as 1 / n, and at the sizes that people can afford it is larger than many differences
    if name == FRECHET and (corrected := estimate.extrapolated()) is not None:
        yield Metric(steps, extractor, f"{FRECHET}_extrapolated", corrected.value, corrected.ci95)


def _manifold_statistics(vectors: NDArray[np.float32], real: NDArray[np.float32]) -> dict[str, Statistic]:
    kept, kept_real = thinned(len(vectors)), thinned(len(real))
    found = manifolds(vectors[kept], real[kept_real])
    place = np.full(len(vectors), -1, dtype=np.int64)
    place[kept] = np.arange(len(kept))

    def chosen(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        places: NDArray[np.int64] = place[rows]
        return places[places >= 0]

    return {
        "precision": lambda rows: found.precision(chosen(rows)),
        "recall": lambda rows: found.recall(chosen(rows)),
    }
