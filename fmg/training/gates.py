"""Checks that stop a run that cannot learn, before it has cost hours."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from fmg.core.errors import GateError
from fmg.core.events import Notice, Observer
from fmg.core.protocols import Policies, Stochasticizer
from fmg.core.types import Batch
from fmg.rl import refresh_old, replay_ratio
from fmg.rl.replay import REFRESHED
from fmg.training.distributed import DistContext

# The replayed ratio may differ from 1 by this share of the clip range before the first update.
RATIO_TOLERANCE = 0.1
CHECKED_ROLLOUTS = 2
# Iterations in a row without an update after which a run is warned, or stopped if it never made one.
IDLE_ITERATIONS = 10
_MORE_VALUES = (
    "Use a reward that distinguishes the images of a prompt, larger groups (rollout.group_size) or other prompts."
)


class ReplayGate:
    """Decides whether a rollout's own log-probs can be compared with an update's.

    It checks before the first update and again at the next rollout: a fresh LoRA adds exactly zero, so the effect of
    the adapter on the replay (dropout, rounding) shows only after the first update.

    Rollout and update may use different shapes or kernels, whose rounding alone can exceed the clip range. Then the old
    log-probs of every rollout are recomputed through the update path.

    Args:
        stochasticizer: the one of the rollouts.
        policies: views of the trained weights.
        clip_range: clip range of the objective; None for one without a ratio, which passes.
        micro_batch: rows of a forward pass, as in the update.
        always_recompute: whether to recompute without checking first.
        observer: receives how the gate was passed.
        dist: the processes that share the rows.
    """

    def __init__(
        self,
        stochasticizer: Stochasticizer,
        policies: Policies,
        *,
        clip_range: float | None,
        micro_batch: int,
        always_recompute: bool,
        observer: Observer,
        dist: DistContext,
    ) -> None:
        self._stochasticizer = stochasticizer
        self._policies = policies
        self._clip_range = clip_range
        self._micro_batch = micro_batch
        self._recompute = always_recompute
        self._observer = observer
        self._dist = dist
        self._checked = 0

    def admit(self, batch: Batch) -> Batch:
        """The batch with old log-probs that are comparable with the update's.

        Raises:
            GateError: the replayed ratio of a checked rollout is not 1 within a tenth of the clip range.
        """
        if self._clip_range is None:
            return batch
        if self._checked >= CHECKED_ROLLOUTS:
            return self._refreshed(batch) if self._recompute else batch
        error = math.inf if self._recompute else self._error(batch)
        if error > RATIO_TOLERANCE * self._clip_range:
            self._recompute = True
            batch = self._refreshed(batch)
            error = self._error(batch)
        ratio_gate(error, self._clip_range)
        self._checked += 1
        if self._checked == CHECKED_ROLLOUTS:
            how = "recomputed through the update path" if self._recompute else "taken from the rollout"
            text = f"Replay gate passed twice: |ratio - 1| <= {error:.1e}, old log-probs {how}."
            self._observer(Notice("info", text))
        return batch

    @property
    def findings(self) -> tuple[int, bool]:
        """Number of rollouts checked so far, and whether old log-probs are recomputed."""
        return self._checked, self._recompute

    def resume(self, checked: int, recompute: bool) -> None:
        """Restores the findings of an earlier process."""
        self._checked, self._recompute = checked, recompute

    def _error(self, batch: Batch) -> float:
        own = self._dist.shard(batch, self._micro_batch)
        return self._dist.max(replay_ratio(self._stochasticizer, self._policies, own, self._micro_batch))

    def _refreshed(self, batch: Batch) -> Batch:
        own = self._dist.shard(batch, self._micro_batch)
        fresh = refresh_old(self._stochasticizer, self._policies, own, self._micro_batch)
        if not self._dist.is_distributed:
            return fresh
        total, unit = len(batch), self._micro_batch
        return batch.with_rows(**{name: self._dist.gather(fresh.rows[name], total, unit) for name in REFRESHED})


def ratio_gate(error: float, clip_range: float) -> None:
    """Stops a run whose replay does not give ratio 1.

    Raises:
        GateError: `error` exceeds a tenth of the clip range.
    """
    limit = RATIO_TOLERANCE * clip_range
    if not error <= limit:
        raise GateError(
            f"Before an update the replayed ratio is off by {error:.2e}, more than {limit:.0e}"
            " (a tenth of the clip range), so clipping would act on noise",
            "Likely causes: dropout or other randomness in the network, a dtype too coarse for the clip range"
            " (try --dtype fp32 or a larger clip_range), or different code in rollout and update.",
        )


def replica_gate(dist: DistContext, parameters: Sequence[tuple[str, Parameter]]) -> None:
    """Stops a run whose processes no longer train the same weights.

    Raises:
        GateError: the bits of a parameter differ between two processes.
    """
    if not dist.is_distributed:
        return
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    if len(set(dist.gather_texts(digest.hexdigest()))) > 1:
        raise GateError(
            f"The {dist.world_size} processes no longer train the same weights",
            "Likely causes: different kinds of devices, or a reward or objective that depends on the process.",
        )


class LearningGate:
    """Checks that iterations make updates: a rollout with equal rewards in every group makes none.

    A reward with few values may start like this, on prompts that the model cannot render yet; but a run that never
    makes an update trains nothing.

    Args:
        observer: receives warnings about iterations without an update.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._idle = 0

    def iteration(self, done: int, touched: int, *, last: bool) -> None:
        """Records one iteration.

        Args:
            done: iterations done.
            touched: the last of them that made an update; 0 for none.
            last: whether it is the run's last one.

        Raises:
            GateError: no update was ever made, in `IDLE_ITERATIONS` iterations of this process or in the whole run.
        """
        self._idle = 0 if touched == done else self._idle + 1
        if not self._idle:
            return
        if touched == 0 and (last or self._idle >= IDLE_ITERATIONS):
            raise GateError(
                f"The run made no update: in every group of every iteration ({done} so far) the rewards were equal,"
                " or one was missing",
                _MORE_VALUES,
            )
        if self._idle == IDLE_ITERATIONS or (self._idle == 1 and touched == 0):
            which = f"Iteration {done} made" if self._idle == 1 else f"The last {self._idle} iterations made"
            text = f"{which} no update: in every group the rewards were equal, or one was missing. {_MORE_VALUES}"
            self._observer(Notice("warning", text))


def movement(before: Mapping[str, Tensor], parameters: Sequence[tuple[str, Parameter]]) -> float:
    """L2 distance of the trainable weights from a copy of them."""
    return math.sqrt(sum(float((p.detach() - before[name]).double().square().sum()) for name, p in parameters))


def movement_gate(distance: float) -> None:
    """Stops a run whose first update changed nothing.

    Raises:
        GateError: the distance is zero or not finite.
    """
    if not math.isfinite(distance):
        raise GateError(
            "After the first update the weights are not finite",
            "Likely causes: too large a learning rate, or a dtype whose range the network exceeds (try --dtype fp32).",
        )
    if distance == 0.0:
        raise GateError(
            "The first update did not move the adapter",
            "Likely causes: a learning rate of 0, equal rewards within every group, or an adapter that is not part of"
            " the network of the rollout.",
        )
