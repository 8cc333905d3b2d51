"""What of a run's metrics a person watches: the reward, and the headline scores on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping

REWARD = "reward/mean"
PREFIX, SUFFIX = "eval/", "_mean"


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """Held-out scores by label: strict accuracies first, then the total of each reward.

    The log keys are `eval/<reward>_mean` for totals and `eval/<reward>_<part>_mean` for parts.
    """
    scores = {
        key.removeprefix(PREFIX).removesuffix(SUFFIX): value
        for key, value in metrics.items()
        if key.startswith(PREFIX) and key.endswith(SUFFIX)
    }
    strict = {_label(name): value for name, value in scores.items() if name.endswith("_strict")}
    totals = {
        name: value
        for name, value in scores.items()
        if not any(name != other and name.startswith(f"{other}_") for other in scores)
    }
    return strict | totals


def _label(name: str) -> str:
    return f"{name.removesuffix('_strict')} strict"
