"""What of a run's metrics a person watches: the reward, and the headline scores on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping

REWARD = "reward/mean"
PREFIX, AVERAGED, SUFFIX = "eval/", "eval_ema/", "_mean"


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """Held-out scores by label: strict accuracies first, then the total of each reward; a moving average's after both.

    The log keys are `eval/<reward>_mean` for totals and `eval/<reward>_<part>_mean` for parts, `eval_ema/...` those of
    the average.
    """
    averaged = {f"{label} (EMA)": value for label, value in _scores(metrics, AVERAGED).items()}
    return _scores(metrics, PREFIX) | averaged


def _scores(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    scores = {
        key.removeprefix(prefix).removesuffix(SUFFIX): value
        for key, value in metrics.items()
        if key.startswith(prefix) and key.endswith(SUFFIX)
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
