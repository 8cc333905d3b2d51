from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray

from fmg.eval.intervals import subset_estimate
from fmg.eval.set_metrics import (
    FeatureSet,
    GroupSpread,
    Manifolds,
    ReferenceSet,
    SetMetrics,
    cosine_diversity,
    fit_gaussian,
    frechet_distance,
    manifolds,
    unit_vectors,
    within_groups,
)
from fmg.registry import feature_extractors


def gaussian(n: int, d: int, seed: int, mean: float = 0.0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + mean


def squared(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(((a - b) ** 2).sum())


def test_within_groups_is_the_mean_over_pairs_in_any_order_and_any_batches() -> None:
    vectors = gaussian(23, 5, 0, mean=1e3).astype(np.float32)
    groups = np.random.default_rng(1).integers(0, 4, 23)
    groups[groups == 3] = 2
    groups[0] = 7  # a group of one has no pair
    wanted = [
        np.mean([squared(a, b) for a, b in itertools.combinations(vectors[groups == g].astype(float), 2)])
        for g in (0, 1, 2)
    ]
    assert within_groups(vectors, groups) == pytest.approx(wanted, rel=1e-4)
    spread = GroupSpread()
    for row in np.random.default_rng(2).permutation(23):
        spread.add(vectors[row : row + 1], groups[row : row + 1])
    assert spread.values() == pytest.approx(wanted, rel=1e-4)


def test_cosine_diversity_is_the_mean_over_pairs() -> None:
    vectors = gaussian(12, 6, 3)
    wanted = np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(vectors, 2)])
    assert cosine_diversity(unit_vectors(vectors)) == pytest.approx(wanted, rel=1e-12)
    assert cosine_diversity(unit_vectors(np.ones((4, 3)))) == pytest.approx(0, abs=1e-12)
    assert within_groups(unit_vectors(vectors).astype(np.float32), np.zeros(12, int)) / 2 == pytest.approx(
        wanted, rel=1e-5
    )


def scipy_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    first, second = np.cov(a.T), np.cov(b.T)
    cross = scipy.linalg.sqrtm(first @ second)
    return squared(a.mean(0), b.mean(0)) + float(np.trace(first + second - 2 * np.real(cross)))


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 16), (500, 60, 32), (90, 80, 70)])
def test_frechet_distance_equals_that_of_scipys_matrix_root(n: int, m: int, d: int) -> None:
    a, b = gaussian(n, d, 4), gaussian(m, d, 5, mean=0.3)
    assert frechet_distance(fit_gaussian(a), fit_gaussian(b)) == pytest.approx(scipy_distance(a, b), rel=1e-9)


def test_frechet_distance_has_its_closed_form_and_survives_singular_covariances() -> None:
    a = gaussian(400, 8, 6)
    assert frechet_distance(fit_gaussian(a), fit_gaussian(a)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(fit_gaussian(a), fit_gaussian(a + 2.0)) == pytest.approx(8 * 4.0, rel=1e-9)
    # of a scaled set: tr S (s - 1)^2, and s - 1 times the mean
    scaled = float(np.trace(np.cov(a.T))) * 0.25 + squared(a.mean(0), 1.5 * a.mean(0))
    assert frechet_distance(fit_gaussian(a), fit_gaussian(1.5 * a)) == pytest.approx(scaled, rel=1e-9)
    few = gaussian(10, 64, 7)
    assert frechet_distance(fit_gaussian(few), fit_gaussian(few)) == pytest.approx(0, abs=1e-9)
    # scipy's root of a singular product loses half of the digits; the exact answer is known
    assert frechet_distance(fit_gaussian(few), fit_gaussian(few + 1)) == pytest.approx(64, rel=1e-9)
    # constant features, as a broken generator has
    assert frechet_distance(fit_gaussian(np.zeros((5, 3))), fit_gaussian(np.zeros((5, 3)))) == 0
    with pytest.raises(ValueError, match="two vectors"):
        fit_gaussian(few[:1])


def brute_force(real: NDArray[np.float64], generated: NDArray[np.float64], k: int = 3) -> tuple[float, float]:
    def inside(points: NDArray[np.float64], centres: NDArray[np.float64]) -> float:
        hits = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = sorted(np.linalg.norm(centre - other) for j, other in enumerate(centres) if j != i)
                if np.linalg.norm(point - centre) <= others[k - 1]:
                    hits += 1
                    break
        return hits / len(points)

    return inside(generated, real), inside(real, generated)


def scored(found: Manifolds, count: int) -> tuple[float, float]:
    rows = np.arange(count)
    return found.precision(rows), found.recall(rows)


def test_precision_and_recall_equal_brute_force() -> None:
    real, generated = gaussian(40, 2, 8), 0.6 * gaussian(50, 2, 8, mean=0.4)
    found = scored(manifolds(generated, real), 50)
    assert found == pytest.approx(brute_force(real, generated))
    assert 0 < found[1] < 1


def test_precision_and_recall_tell_fidelity_from_coverage() -> None:
    rng = np.random.default_rng(9)
    real = np.concatenate([rng.normal(size=(150, 4)), rng.normal(size=(150, 4)) + 30])
    one_mode, noise = rng.normal(size=(200, 4)), rng.normal(size=(200, 4)) * 60
    precision, recall = scored(manifolds(one_mode, real), 200)
    assert precision > 0.9
    assert 0.3 < recall < 0.5
    assert scored(manifolds(noise, real), 200)[0] < 0.1
    # far from the origin nothing changes: distances do not cancel
    moved = scored(manifolds((one_mode + 1e4).astype(np.float32), (real + 1e4).astype(np.float32)), 200)
    assert moved == pytest.approx((precision, recall), abs=0.03)
    with pytest.raises(ValueError, match="more than 3"):
        manifolds(one_mode[:3], real)


def test_halves_give_the_standard_error_of_a_mean() -> None:
    values = np.random.default_rng(10).normal(size=401)
    found = subset_estimate(lambda rows: float(values[rows].mean()), 401)
    assert (found.ci95[1] - found.ci95[0]) / 2 == pytest.approx(1.96 * values.std() / 401**0.5, rel=0.25)
    assert found.value == values.mean()
    alone = subset_estimate(lambda rows: float(values[rows].mean()), 7, least=4)
    assert alone.ci95 == (-np.inf, np.inf)


def test_the_frechet_interval_covers_and_the_extrapolation_removes_the_bias() -> None:
    """Two samples of one distribution: the distance is 0, so the measured value is bias."""
    d, n = 6, 200
    mixing = np.random.default_rng(11).normal(size=(d, d))
    truth = fit_gaussian(np.random.default_rng(12).normal(size=(50_000, d)) @ mixing)
    values, covered, corrected = [], [], []
    for seed in range(60):
        sample = np.random.default_rng(100 + seed).normal(size=(n, d)) @ mixing
        found = subset_estimate(lambda rows, x=sample: frechet_distance(fit_gaussian(x[rows]), truth), n)
        values.append(found.value)
        covered.append(found.ci95)
        beyond = found.extrapolated()
        assert beyond is not None
        corrected.append(beyond.value)
    bias = float(np.mean(values))
    assert np.mean([low <= bias <= high for low, high in covered]) > 0.8
    assert abs(np.mean(corrected)) < 0.15 * bias


def seen(pictures: torch.Tensor, groups: NDArray[np.int64]) -> FeatureSet:
    found = FeatureSet(feature_extractors.build("pixels", {"side": 2}), groups)
    for chunk in pictures.split(7):
        found.take(chunk)
    return found


def test_the_metrics_of_a_set_and_their_paired_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(60, 3, 4, 4, generator=generator)
    groups = np.arange(60) % 6
    reference = ReferenceSet.of(seen(torch.rand(80, 3, 4, 4, generator=generator), np.zeros(80, int)).vectors)
    ours = SetMetrics.of(seen(base * 0.5 + 0.25, groups), reference)
    theirs = SetMetrics.of(seen(base, groups), reference)
    rows = {row.metric: row for row in ours.rows(4, "pixels")}
    assert list(rows) == [
        "diversity_within_prompts",
        "cosine_diversity",
        "frechet",
        "frechet_extrapolated",
        "precision",
        "recall",
    ]
    for row in rows.values():
        assert row.ci95[0] <= row.value <= row.ci95[1]
        assert row.metric in ("precision", "recall") or row.ci95[0] < row.ci95[1]
        assert (row.steps, row.extractor) == (4, "pixels")
    delta = {row.metric: row for row in ours.difference(theirs, 4, "pixels")}
    before = {row.metric: row for row in theirs.rows(4, "pixels")}
    for name in rows:
        assert delta[name].value == pytest.approx(rows[name].value - before[name].value, abs=1e-9)
    # half the contrast, image by image
    assert rows["diversity_within_prompts"].value == pytest.approx(0.25 * before["diversity_within_prompts"].value)
    assert delta["frechet"].ci95[0] > 0
    assert rows["frechet_extrapolated"].value < rows["frechet"].value
    assert [row.value for row in theirs.difference(theirs, 4, "pixels")] == [0.0] * 6


def test_a_set_that_cannot_be_halved_has_no_extrapolated_row() -> None:
    pictures = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    reference = ReferenceSet.of(seen(pictures[8:], np.zeros(12, int)).vectors)
    few, more = (SetMetrics.of(seen(pictures[:n], np.zeros(n, int)), reference) for n in (7, 8))
    for found, expected in ((few, False), (more, True)):
        for rows in (found.rows(4, "pixels"), found.difference(found, 4, "pixels")):
            names = [row.metric for row in rows]
            assert "frechet" in names
            assert ("frechet_extrapolated" in names) == expected


def test_small_sets_say_what_they_can() -> None:
    pictures = torch.rand(21, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    reference = ReferenceSet.of(seen(pictures, np.arange(21)).vectors)
    assert [row.metric for row in SetMetrics.of(seen(pictures[:2], np.zeros(2, int)), reference).rows(1, "p")] == [
        "diversity_within_prompts"
    ]
    few = {row.metric: row for row in SetMetrics.of(seen(pictures[:5], np.arange(5)), reference).rows(1, "p")}
    assert "diversity_within_prompts" not in few
    assert few["cosine_diversity"].ci95 == (-np.inf, np.inf)
    # a distance is not negative and a share is not above 1
    assert few["frechet"].ci95 == (0.0, np.inf)
    assert few["recall"].ci95 == (0.0, 1.0)
    rows = {row.metric: row for row in SetMetrics.of(seen(pictures, np.arange(21)), reference).rows(1, "p")}
    assert rows["frechet"].value == pytest.approx(0, abs=1e-9)
    assert rows["precision"].value == rows["recall"].value == 1.0
