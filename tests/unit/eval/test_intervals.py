from __future__ import annotations

import numpy as np
import pytest

from fmg.eval.intervals import bootstrap_mean


def test_the_interval_of_independent_values_matches_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.5, size=4000)
    low, high = bootstrap_mean(values)
    half = 1.96 * 1.5 / np.sqrt(4000)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_values_that_repeat_within_clusters_widen_the_interval() -> None:
    means = np.random.default_rng(1).normal(size=50)
    values, clusters = np.repeat(means, 40), np.repeat(np.arange(50), 40)
    naive = np.subtract(*bootstrap_mean(values))
    honest = np.subtract(*bootstrap_mean(values, clusters))
    assert honest / naive == pytest.approx(np.sqrt(40), rel=0.2)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_mean(rng.normal(size=60))
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_one_cluster_says_nothing_about_others() -> None:
    assert bootstrap_mean(np.ones(5), np.zeros(5, dtype=np.int64)) == (-np.inf, np.inf)


def test_large_samples_are_resampled_in_pieces_with_the_same_result() -> None:
    values = np.random.default_rng(3).normal(size=9000)
    low, high = bootstrap_mean(values)
    assert low < values.mean() < high
    assert bootstrap_mean(values) == (low, high)
