"""From scores of images to rows of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from fmg.eval.intervals import bootstrap_mean
from fmg.eval.results import MEAN_OF_TAGS, Difference, Metric, Result, TagResult
from fmg.eval.scoring import Scores, prompt_clusters
from fmg.eval.set_metrics import SetMetrics


def result_rows(steps: int, scores: Scores) -> Iterator[Result]:
    """The mean of every part of every reward."""
    clusters = prompt_clusters(scores.prompts)
    for (reward, part), values in scores.parts.items():
        yield Result(steps, reward, part, float(values.mean()), float(values.std()), interval(values, clusters))


def difference_rows(steps: int, ours: Scores, theirs: Scores) -> Iterator[Difference]:
    """Paired differences of the same images."""
    clusters = prompt_clusters(ours.prompts)
    for key, values in ours.parts.items():
        delta = values - theirs.parts[key]
        yield Difference(steps, *key, float(delta.mean()), interval(delta, clusters))


def tag_rows(steps: int, scores: Scores) -> Iterator[TagResult]:
    """The mean of every part for each tag, and the mean over tags; nothing when all prompts have the same tag.

    Tags are independent, so the half-width of the mean over tags is the root of the sum of their squares.
    """
    tags = np.asarray(scores.tags)
    names = sorted(set(scores.tags))
    if len(names) < 2:
        return
    clusters = prompt_clusters(scores.prompts)
    rows = {tag: np.flatnonzero(tags == tag) for tag in names}
    for (reward, part), values in scores.parts.items():
        means, halves = [], []
        for tag in names:
            chosen = values[rows[tag]]
            ci95 = interval(chosen, clusters[rows[tag]])
            yield TagResult(steps, reward, part, tag, len(chosen), float(chosen.mean()), ci95)
            means.append(float(chosen.mean()))
            halves.append((ci95[1] - ci95[0]) / 2)
        mean, half = float(np.mean(means)), float(np.linalg.norm(halves)) / len(names)
        yield TagResult(steps, reward, part, MEAN_OF_TAGS, len(values), mean, (mean - half, mean + half))


def metric_rows(steps: int, metrics: Mapping[str, SetMetrics]) -> Iterator[Metric]:
    """The metrics of every extractor."""
    for name, found in metrics.items():
        yield from found.rows(steps, name)


def interval(values: NDArray[np.float64], clusters: NDArray[np.int64]) -> tuple[float, float]:
    """Of a mean, over prompts; with a single prompt its images are all the evidence there is."""
    return bootstrap_mean(values, clusters if np.ptp(clusters) > 0 else None)
