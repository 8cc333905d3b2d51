"""Detects reward hacking: the trained reward rises while a held-out reward, or the diversity of samples, falls.

All evaluations use the same prompts and noise, so two of them are compared image by image. A held-out reward is
compared with its highest evaluation, since over-optimisation often lets it rise first (Gao et al., arXiv 2210.10760).
Its fall is measured in standard deviations of its scores over the images of the untouched model, a unit common to all
rewards. If the standard deviation of the evaluation is larger, it is used instead; and the unit is never below `FLOOR`
of the mean or `TINY`, for rewards that the untouched model saturates. Diversity is that of the rollouts' groups,
compared with the first rollout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from fmg.core import metric_keys as keys
from fmg.data.run_metrics import Change, HackingLimits, is_hacking

FLOOR, TINY = 1e-3, 1e-5
"""Minimum unit of a reward: relative to its mean on the untouched model, and absolute. The spread of equal
scores is only rounding, relative to which any fall would be enormous."""

Scores = Float[np.ndarray, " n"]
_UNKNOWN = Change(0.0, math.inf)


@dataclass(frozen=True)
class Reading:
    """One monitored quantity at one evaluation.

    Attributes:
        name: the held-out reward, or `diversity`.
        loss: how far it fell: for a reward in standard deviations, for the diversity as a share of the first.
        limit: tolerated loss.
        before, now: its mean at the reference and now.
        since: the last evaluation at which the loss was within the limit.
        trained: change of the trained reward since then; unknown for the diversity.
    """

    name: str
    loss: Change
    limit: float
    before: float
    now: float
    since: int
    trained: Change = _UNKNOWN

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Reading:
        """The inverse of `dataclasses.asdict`."""
        # states of older versions have no change
        changes = {key: Change(**state[key]) for key in ("loss", "trained") if key in state}
        return cls(**{**state, **changes})

    @property
    def eligible(self) -> bool:
        """Whether the loss is within the limit, or indistinguishable from none."""
        return self.loss.value <= self.limit or self.loss.low <= 0


@dataclass(frozen=True)
class HackingVerdict:
    """The monitor's finding at one evaluation.

    Attributes:
        iteration: iteration of the evaluation.
        gain: rise of the trained reward since the untouched model, in the same unit as losses.
        readings: all monitored quantities.
        hacked: those that fell while the trained reward rose.
    """

    iteration: int
    gain: Change
    readings: tuple[Reading, ...]
    hacked: tuple[Reading, ...]

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> HackingVerdict:
        """The inverse of `dataclasses.asdict`."""
        readings, hacked = (
            tuple(Reading.restored(reading) for reading in state[key]) for key in ("readings", "hacked")
        )
        return cls(state["iteration"], Change(**state["gain"]), readings, hacked)

    @property
    def eligible(self) -> bool:
        """Whether the checkpoint of this evaluation may be the best one."""
        return self.gain.low <= 0 or all(reading.eligible for reading in self.readings)

    @property
    def began(self) -> int | None:
        """The last evaluation before the gap, or None without a gap."""
        return min((reading.since for reading in self.hacked), default=None)

    def metrics(self) -> dict[str, float]:
        """`watch/trained_gain`, and for everything monitored `watch/<name>_loss` and the change of the trained reward
        since the gap opened, `watch/<name>_trained`; each with its `_se`."""
        named = {keys.TRAINED_GAIN: self.gain, **{keys.watched_loss(r.name): r.loss for r in self.readings}}
        named |= {keys.watched_trained(r.name): r.trained for r in self.readings if r.trained != _UNKNOWN}
        return {k: v for key, c in named.items() for k, v in ((key, c.value), (keys.error_of(key), c.error))}

    def text(self) -> str:
        """The warning."""
        falls = " and ".join(f"{r.name} fell from {r.before:.3f} to {r.now:.3f}" for r in self.hacked)
        return (
            f"Reward hacking: after iteration {self.began} a gap opened. While the trained reward rose by"
            f" {self.gain.value:.2f} standard deviations, {falls}. Checkpoints inside the gap are never kept."
        )


@dataclass
class _Reference:
    """The highest evaluation of a held-out reward, and the last eligible one, with the trained scores at that time."""

    scores: Scores
    eligible: int
    trained: Scores


@dataclass
class _Spread:
    """Running sums of the diversity of groups."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, other: _Spread) -> None:
        self.count, self.total = self.count + other.count, self.total + other.total
        self.squares += other.squares

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def error(self) -> float:
        if self.count < 2:
            return math.inf
        variance = max(0.0, self.squares / self.count - self.mean**2) * self.count / (self.count - 1)
        return math.sqrt(variance / self.count)


def _scale(first: Scores, now: Scores) -> float:
    # a strict score may be 0, or nearly 1, for every image at first
    return max(float(first.std()), float(now.std()), FLOOR * abs(float(first.mean())), TINY)


def _paired(after: Scores, before: Scores, scale: float) -> Change:
    """The mean of `after - before` over `scale`. One image has no standard error."""
    difference = after - before
    if not np.any(difference):
        return Change(0.0, 0.0)
    if len(difference) < 2:
        return Change(float(difference.mean()) / scale, math.inf)
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return Change(float(difference.mean()) / scale, error / scale)


@dataclass
class HackingMonitor:
    """Compares every evaluation with earlier ones; a resumed run continues from its `state`.

    Attributes:
        tolerance: tolerated fall of a held-out reward, in standard deviations over images.
        min_diversity: share of the first rollout's diversity that samples of one prompt must keep.
        found: the first verdict of hacking, or None.
    """

    tolerance: float
    min_diversity: float
    found: HackingVerdict | None = field(default=None, init=False)
    _trained: Scores | None = field(default=None, init=False)
    _first: dict[str, Scores] = field(default_factory=dict, init=False)
    _best: dict[str, _Reference] = field(default_factory=dict, init=False)
    _diverse_at_first: _Spread = field(default_factory=_Spread, init=False)
    _diverse: _Spread = field(default_factory=_Spread, init=False)
    _diverse_until: int = field(default=0, init=False)

    @property
    def _limits(self) -> HackingLimits:
        return HackingLimits(self.tolerance, self.min_diversity)

    def add_rollout(self, count: float, total: float, squares: float) -> None:
        """Adds the diversity of one rollout: number of groups, sum over them, sum of squares."""
        if self._diverse_at_first.count == 0:
            self._diverse_at_first = _Spread(count, total, squares)
        self._diverse.add(_Spread(count, total, squares))

    def judge(self, iteration: int, trained: NDArray[np.float64], held_out: Mapping[str, Scores]) -> HackingVerdict:
        """Judges an evaluation; the first one is the untouched model.

        Args:
            iteration: iterations done.
            trained: the trained mixture of every image.
            held_out: the total of every reward that is not trained, for the same images in the same order.
        """
        if self._trained is None:
            self._trained, self._first = trained, dict(held_out)
            self._best = {name: _Reference(scores, iteration, trained) for name, scores in held_out.items()}
        gain = _paired(trained, self._trained, _scale(self._trained, trained))
        readings = [self._reward(name, iteration, trained, scores) for name, scores in held_out.items()]
        if spread := self._diversity(iteration):
            readings.append(spread)
        hacked = tuple(r for r in readings if is_hacking(gain, r.loss, r.limit, r.trained))
        verdict = HackingVerdict(iteration, gain, tuple(readings), hacked)
        if hacked and self.found is None:
            self.found = verdict
        return verdict

    def _reward(self, name: str, iteration: int, trained: Scores, scores: Scores) -> Reading:
        best = self._best[name]
        if scores.mean() > best.scores.mean():
            best = self._best[name] = _Reference(scores, iteration, trained)
        loss = _paired(best.scores, scores, _scale(self._first[name], scores))
        before, now = float(best.scores.mean()), float(scores.mean())
        since = _paired(trained, best.trained, _scale(best.trained, trained))
        reading = Reading(name, loss, self._limits.of(name), before, now, best.eligible, since)
        if reading.eligible:
            best.eligible, best.trained = iteration, trained
        return reading

    def _diversity(self, iteration: int) -> Reading | None:
        first, since = self._diverse_at_first, self._diverse
        if since.count == 0 or first.mean <= 0:
            return None
        share = since.mean / first.mean
        error = math.hypot(since.error, share * first.error) / first.mean
        loss, limit = Change(1 - share, error), self._limits.of(keys.DIVERSITY)
        reading = Reading(keys.DIVERSITY, loss, limit, first.mean, since.mean, self._diverse_until)
        if reading.eligible:
            self._diverse_until = iteration
        self._diverse = _Spread()
        return reading

    def state(self) -> dict[str, Any]:
        """Nested values with tensors, for `restore`."""
        return {
            "trained": None if self._trained is None else torch.from_numpy(self._trained.copy()),
            "first": {name: torch.from_numpy(x.copy()) for name, x in self._first.items()},
            "best": {
                name: {
                    "scores": torch.from_numpy(x.scores.copy()),
                    "trained": torch.from_numpy(x.trained.copy()),
                    "sound": x.eligible,
                }
                for name, x in self._best.items()
            },
            "diversity": [[x.count, x.total, x.squares] for x in (self._diverse_at_first, self._diverse)],
            "diverse_until": self._diverse_until,
            "found": None if self.found is None else asdict(self.found),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        self._trained = None if state["trained"] is None else state["trained"].numpy()
        self._first = {name: x.numpy() for name, x in state["first"].items()}
        self._best = {
            name: _Reference(x["scores"].numpy(), x["sound"], x["trained"].numpy()) for name, x in state["best"].items()
        }
        self._diverse_at_first, self._diverse = (_Spread(*sums) for sums in state["diversity"])
        self._diverse_until = state["diverse_until"]
        self.found = None if state["found"] is None else HackingVerdict.restored(state["found"])
