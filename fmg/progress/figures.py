"""Numbers in a few characters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"


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
