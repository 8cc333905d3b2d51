"""What of a run's metrics a person watches: the reward, the headline scores on held-out prompts, reward hacking."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

REWARD = "reward/mean"
PREFIX, AVERAGED, SUFFIX = "eval/", "eval_ema/", "_mean"
WATCH = "watch/"
DIVERSITY = "diversity"
ERRORS = 3.0
"""Standard errors by which something has to be beyond a bound. One evaluation of a run whose true loss is the tolerance
exceeds it with probability 0.0013; at a true loss of 0 and 1000 images practically never."""


@dataclass(frozen=True)
class Change:
    """A difference and its standard error."""

    value: float
    error: float

    @property
    def low(self) -> float:
        """What it confidently exceeds."""
        return self.value - ERRORS * self.error

    @property
    def high(self) -> float:
        """What it is confidently below."""
        return self.value + ERRORS * self.error

    @classmethod
    def logged(cls, line: Mapping[str, float], key: str) -> Change:
        """The change that an evaluation logged as `key` and `<key>_se`; no known change where it has none."""
        return cls(line.get(key, 0.0), line.get(f"{key}_se", math.inf))


@dataclass(frozen=True)
class HackingLimits:
    """Losses that are tolerated, from the recipe's `eval` section.

    Attributes:
        tolerance: `eval.hacking_tolerance`: fall of a held-out reward, in standard deviations over images.
        min_diversity: `eval.min_diversity`: share of the first rollout's diversity that has to stay.
    """

    tolerance: float
    min_diversity: float

    def of(self, name: str) -> float:
        """The tolerated loss of a held-out reward, or of `diversity`."""
        return 1 - self.min_diversity if name == DIVERSITY else self.tolerance


def is_hacking(gain: Change, loss: Change, limit: float, trained: Change) -> bool:
    """The rule of the tripwire and of `fmg doctor run`.

    Args:
        gain: of the trained reward since the untouched model.
        loss: of something that is not trained.
        limit: of the loss.
        trained: change of the trained reward since the gap opened; a run that loses both is no hacker.
    """
    return gain.low > 0 and loss.low > limit and not trained.high < 0


def hacked(line: Mapping[str, float], limits: HackingLimits) -> Iterator[tuple[str, Change]]:
    """What the log line of an evaluation shows to be hacked: its name, and its loss."""
    for key in line:
        if not (key.startswith(WATCH) and key.endswith("_loss")):
            continue
        name, loss = key.removeprefix(WATCH).removesuffix("_loss"), Change.logged(line, key)
        since = Change.logged(line, f"{WATCH}{name}_trained")
        if is_hacking(Change.logged(line, f"{WATCH}trained_gain"), loss, limits.of(name), since):
            yield name, loss


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
