"""What of a run's metrics a person watches: the reward, and the headline scores on held-out prompts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

REWARD = "reward/mean"
_SUFFIX = "_mean"
_BARS = "▁▂▃▄▅▆▇█"


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """Held-out scores by label: strict accuracies first, then the total of each reward; a moving average's after both.

    The log keys are `eval/<reward>_mean` for totals and `eval/<reward>_<part>_mean` for parts, `eval_ema/...` those of
    the average.
    """
    averaged = {f"{label} (EMA)": value for label, value in _scores(metrics, "eval_ema/").items()}
    return _scores(metrics, "eval/") | averaged


def _scores(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    scores = {
        key.removeprefix(prefix).removesuffix(_SUFFIX): value
        for key, value in metrics.items()
        if key.startswith(prefix) and key.endswith(_SUFFIX)
    }
    strict = {_label(name): value for name, value in scores.items() if name.endswith("_strict")}
    totals = {
        name: value
        for name, value in scores.items()
        if not any(name != other and name.startswith(f"{other}_") for other in scores)
    }
    return strict | totals


def signed(delta: float) -> str:
    """A difference with its sign; one that rounds to nothing has a plus."""
    rounded = round(delta, 3)
    return f"{rounded + 0.0:+.3f}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of `values` as at most `width` block characters, from their lowest to their highest."""
    if not values:
        return ""
    buckets = min(width, len(values))
    edges = [round(i * len(values) / buckets) for i in range(buckets + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in means)


def _label(name: str) -> str:
    return f"{name.removesuffix('_strict')} strict"
