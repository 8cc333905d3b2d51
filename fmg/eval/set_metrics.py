"""Metrics of a whole set of images, from the features of an extractor: diversity, and distance to a reference set.

Features are collected while the images are generated and scored, so that a set is never kept as pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fmg.core.display import counted
from fmg.core.errors import UsageError
from fmg.core.protocols import FeatureExtractor
from fmg.eval.image_folders import PICTURES_A_BATCH, batches, picture_files
from fmg.eval.intervals import Estimate, bootstrap_mean, subset_estimate
from fmg.eval.results import Metric
from fmg.eval.scoring import Parts

FRECHET = "frechet"
_RANGES = {FRECHET: (0.0, np.inf), "precision": (0.0, 1.0), "recall": (0.0, 1.0)}
"""The range of a metric, to which its symmetric interval is clipped."""
NEIGHBOURS = 3
"""k of the nearest-neighbour balls of precision and recall, as in the paper."""
MAX_IMAGES = 10_000
"""Larger sets are evenly thinned to this size for precision and recall, so that distances fit in memory."""
LEAST = NEIGHBOURS + 1
"""Minimum images of a set for everything but diversity within prompts."""
WORLD = "world"
WORLD_DRAWS = 4
"""Renderings of a world for each image that is evaluated."""
_WORLD_SEED = 0

Vectors = Float[np.ndarray, "n d"]
Labels = Int[np.ndarray, " n"]
Statistic = Callable[[NDArray[np.int64]], float]
"""A statistic of some rows of a set."""


# Diversity: the mean distance over pairs. The sum over pairs follows from sums over images, so that no pair is ever
# formed and memory grows with the number of groups, not of images.


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
        """Adds images: their feature vectors and the groups that they belong to."""
        for vector, label in zip(vectors, groups.tolist(), strict=True):
            count = self._counts.get(label, 0) + 1
            mean = self._means.setdefault(label, np.zeros(vector.shape, dtype=np.float32))
            before = vector - mean
            mean += before / count
            after = vector - mean
            self._counts[label] = count
            self._scatters[label] = self._scatters.get(label, 0.0) + float(np.dot(before, after.astype(np.float64)))

    def values(self) -> Float[np.ndarray, " groups"]:
        """One value for each group with two images or more, by increasing label; empty when there is none."""
        known = sorted(label for label, count in self._counts.items() if count > 1)
        return np.asarray([2 * self._scatters[g] / (self._counts[g] - 1) for g in known], dtype=np.float64)


def within_groups(vectors: Vectors, groups: Labels) -> Float[np.ndarray, " groups"]:
    """Mean squared Euclidean distance over the pairs of each group with two images or more, by increasing label.

    Args:
        vectors: one feature vector per image, such as the maps of a feature extractor, which set the unit of the
            result.
        groups: the prompt or rollout group of each image.
    """
    spread = GroupSpread()
    spread.add(vectors, groups)
    return spread.values()


def unit_vectors(vectors: Vectors) -> Float[np.ndarray, "n d"]:
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


# Fréchet distance between the Gaussians that fit two sets of features (Heusel et al., arXiv 1706.08500, eq. 6):
# |m_1 - m_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2), all in fp64. The last trace is the nuclear norm of F_1' F_2
# for any factors S_i = F_i F_i': singular values keep the precision that eigenvalues of the product lose where a
# covariance is singular, as it is with fewer images than features.


@dataclass(frozen=True)
class GaussianFit:
    """A Gaussian fitted to features: mean (d,), and a factor (d, r) of the unbiased covariance."""

    mean: NDArray[np.float64]
    factor: NDArray[np.float64]

    @property
    def trace(self) -> float:
        return float(np.square(self.factor).sum())


def fit_gaussian(features: Float[np.ndarray, "n d"]) -> GaussianFit:
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
    return GaussianFit(mean, deviations.T if n <= d else symmetric_root(deviations.T @ deviations))


def symmetric_root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The symmetric square root of a covariance by its eigenvalues, of which negative ones (rounding) become 0."""
    values, vectors = np.linalg.eigh(covariance)
    scaled: NDArray[np.float64] = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return scaled


def frechet_distance(first: GaussianFit, second: GaussianFit) -> float:
    """The distance of two fits; a negative value, which only rounding can give, becomes 0."""
    shift = float(np.square(first.mean - second.mean).sum())
    overlap = float(np.linalg.svd(first.factor.T @ second.factor, compute_uv=False).sum())
    return max(shift + first.trace + second.trace - 2 * overlap, 0.0)


# Precision and recall by nearest neighbours (Kynkäänniemi et al., arXiv 1904.06991, eq. 1 and 2). Precision: the share
# of generated images inside the manifold of the real ones, the union of balls around each image that reach its k-th
# nearest neighbour. Recall: the share of real images inside the manifold of the generated ones.


@dataclass(frozen=True)
class Manifolds:
    """Squared distances among generated features, and between generated and real ones; radii of the real ones."""

    among: NDArray[np.float32]
    across: NDArray[np.float32]
    real_radii: NDArray[np.float32]

    def precision(self, rows: Int[np.ndarray, " k"]) -> float:
        """Precision of the generated images in `rows`."""
        return float((self.across[rows] <= self.real_radii).any(1).mean())

    def recall(self, rows: Int[np.ndarray, " k"]) -> float:
        """Recall of the real images by the manifold of the generated images in `rows`."""
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


# Sets of images


class FeatureSet:
    """Features of one set of images, in the order in which they come.

    Args:
        extractor: the feature extractor.
        groups: the prompt of each image as a number; images of one prompt are compared for diversity.
    """

    def __init__(self, extractor: FeatureExtractor, groups: Int[np.ndarray, " n"]) -> None:
        self._extractor = extractor
        self.groups = groups
        self._vectors: list[NDArray[np.float32]] = []
        self._spread = GroupSpread()
        self._count = 0

    def take(self, images: Float[Tensor, "b 3 h w"]) -> None:
        features = self._extractor(images)
        rows = slice(self._count, self._count + len(images))
        self._count = rows.stop
        self._vectors.append(features.vectors.numpy())
        self._spread.add(features.maps.numpy(), self.groups[rows])

    def sink(self, images: Float[Tensor, "b 3 h w"], scores: Parts) -> None:
        """`take` as a `Sink` of an evaluation."""
        self.take(images)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """One row per image."""
        return np.concatenate(self._vectors)

    def spread(self) -> NDArray[np.float64]:
        """Mean distance of maps over the pairs of each prompt that has two images or more."""
        return self._spread.values()


@dataclass(frozen=True)
class ReferenceSet:
    """Real images to compare a set with: their features and the Gaussian that fits them."""

    vectors: NDArray[np.float32]
    fitted: GaussianFit

    @staticmethod
    def of(vectors: NDArray[np.float32]) -> ReferenceSet:
        """Built from at least `LEAST` feature vectors."""
        return ReferenceSet(vectors, fit_gaussian(vectors))


@dataclass(frozen=True)
class SetMetrics:
    """The metrics of one set of `count` images: `spread` by prompt, and statistics of any rows by name."""

    spread: NDArray[np.float64]
    statistics: Mapping[str, Statistic]
    count: int

    @staticmethod
    def of(features: FeatureSet, reference: ReferenceSet | None) -> SetMetrics:
        """All metrics of `features`; without a reference set, only diversity."""
        vectors = features.vectors
        units = unit_vectors(vectors)
        statistics: dict[str, Statistic] = {}
        if len(vectors) >= LEAST:
            statistics["cosine_diversity"] = lambda rows: cosine_diversity(units[rows])
            if reference is not None:
                statistics[FRECHET] = lambda rows: frechet_distance(fit_gaussian(vectors[rows]), reference.fitted)
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
        """This set minus another with the same prompts and seeds."""
        if len(self.spread):
            delta = self.spread - other.spread
            yield Metric(steps, extractor, "diversity_within_prompts", float(delta.mean()), bootstrap_mean(delta))
        for name, ours in self.statistics.items():
            theirs = other.statistics[name]
            paired = _difference(ours, theirs)
            yield from _rows(steps, extractor, name, subset_estimate(paired, self.count, least=LEAST))


def metric_rows(steps: int, metrics: Mapping[str, SetMetrics]) -> Iterator[Metric]:
    """The metrics of every extractor."""
    for name, found in metrics.items():
        yield from found.rows(steps, name)


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


# Reference sets: a folder of real pictures, or true pictures of a world's prompts


@runtime_checkable
class DrawsTruth(Protocol):
    """A prompt set of an embedded world, which can render what its prompts describe."""

    def true_images(self, prompts: Sequence[str], seed: int) -> Float[Tensor, "n 3 h w"]:
        """One rendering of each prompt, in [0, 1]; positions and sizes are random."""


def references(
    reference: str | None,
    features: Mapping[str, FeatureExtractor],
    device: torch.device,
    prompt_set: object = None,
    prompts: Sequence[str] = (),
) -> dict[str, ReferenceSet]:
    """The reference set of each extractor; empty without a reference.

    Args:
        reference: a folder of real images, or `world` for `WORLD_DRAWS` renderings of each of `prompts`.
        features: extractors by name.
        device: where the images go.
        prompt_set: the set that the prompts are from.
        prompts: the prompts of the images that are compared.

    Raises:
        UsageError: there is no extractor, no such folder, too few images, or no world. Also as in `batches`.
    """
    if reference is None:
        return {}
    if not features:
        raise UsageError(
            "Comparing with a reference set needs a feature extractor", "Name an extractor: --features clip, or pixels."
        )
    if reference == WORLD:
        if not isinstance(prompt_set, DrawsTruth):
            raise UsageError(
                "The reference 'world' needs prompts of an embedded world", "Name a folder of real images instead."
            )
        drawn = prompt_set.true_images([prompt for prompt in prompts for _ in range(WORLD_DRAWS)], _WORLD_SEED)
        return {name: _reference(torch.split(drawn, PICTURES_A_BATCH), by, device) for name, by in features.items()}
    files = picture_files(Path(reference))
    if len(files) < LEAST:
        raise UsageError(
            f"'{reference}' has only {counted(len(files), 'image')}",
            f"Give at least {LEAST}; reference sets usually have thousands.",
        )
    return {name: _reference((images for _, images in batches(files)), by, device) for name, by in features.items()}


def _reference(images: Iterable[Tensor], extractor: FeatureExtractor, device: torch.device) -> ReferenceSet:
    return ReferenceSet.of(np.concatenate([extractor(batch.to(device)).vectors.numpy() for batch in images]))
