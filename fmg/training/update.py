"""Optimizer updates of one rollout, and the moving average of what they train."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from fmg.core import metric_keys as keys
from fmg.core.errors import GateError
from fmg.core.protocols import Objective, Policies
from fmg.core.types import Batch
from fmg.models.common.policy_weights import WeightSnapshot
from fmg.training.distributed import DistContext
from fmg.training.lr_schedule import LrSchedule

# Rows that the policy is measured on after each update: enough for a KL, cheap beside the update itself.
PROBE_ROWS = 48


@dataclass(frozen=True)
class Updater:
    """Applies an objective to batches.

    Attributes:
        objective: the loss.
        policies: current, old and reference maps.
        optimizer: optimizer of the trainable parameters.
        parameters: the trainable parameters.
        max_grad_norm: gradients are scaled down to this global norm.
        micro_batch: rows of a forward pass; the update does not depend on it beyond rounding.
        dist: the processes that share the rows of every update, which does not depend on their number beyond rounding.
        schedule: learning-rate schedule; None leaves the optimizer's.
    """

    objective: Objective
    policies: Policies
    optimizer: torch.optim.Optimizer
    parameters: Sequence[Parameter]
    max_grad_norm: float
    micro_batch: int
    dist: DistContext = field(default_factory=DistContext)
    schedule: LrSchedule | None = None

    def update(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on the mean loss over `batch`.

        Returns:
            `rows`, how many it had; `loss`; `grad_norm`, before clipping; and the objective's parts on a probe
            **after** the step, so that `approx_kl` says how far the policy moved.

        Raises:
            GateError: when the gradient is not finite; the weights are then as before the call.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part, share in self._micro_batches(batch):
            loss = self.objective.loss(self.policies, part)
            (loss.total * share).backward()  # type: ignore[no-untyped-call]
            total += float(loss.total.detach()) * share
        self.dist.sum_gradients(self.parameters)
        total = self.dist.reduce({keys.LOSS: total})[keys.LOSS]
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if not math.isfinite(norm) or not math.isfinite(total):
            self.optimizer.zero_grad(set_to_none=True)
            raise GateError(
                f"The loss is {total:.3g} and its gradient norm {norm:.3g}: not finite",
                "Lower the learning rate, or train in fp32; the last saved adapter is intact.",
            )
        self.optimizer.step()
        rows = torch.linspace(0, len(batch) - 1, min(PROBE_ROWS, len(batch))).long()
        return {"rows": float(len(batch)), keys.LOSS: total, keys.GRAD_NORM: norm, **self.measure(batch.select(rows))}

    def updates(
        self, batch: Batch, count: int, seed: int, kl_limit: float | None, first: int = 0
    ) -> Iterator[dict[str, float]]:
        """At most `count` updates, each on its own random part of `batch`; yields what `update` returns of each.

        `first` is the number of its first update in the run, which determines the learning rate.

        Stops after an update whose measured `approx_kl` exceeds `kl_limit` (docs/math.md, eq. 27): the other rows
        were sampled by a policy that is no longer close. None never stops early.
        """
        for number, part in enumerate(partition(batch, count, seed), first):
            if self.schedule is not None:
                self.schedule.set(number)
            logged = self.update(part)
            yield logged
            if kl_limit is not None and logged[keys.APPROX_KL] > kl_limit:
                return

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, float]:
        """The objective's parts over `batch`: means over rows, maxima for keys ending in `_max`."""
        sums: defaultdict[str, float] = defaultdict(float)
        for part, share in self._micro_batches(batch):
            for key, value in self.objective.loss(self.policies, part).parts.items():
                if key.endswith(keys.MAX):
                    sums[key] = max(sums[key], float(value))
                else:
                    sums[key] += float(value) * share
        return self.dist.reduce(sums)

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """This process's rows in micro-batches, each with its share of the whole batch.

        Every process gets the same number, so that all make the same calls; one without rows left takes any row, with a
        share of 0.
        """
        shard = self.dist.shard_of(len(batch), self.micro_batch)
        rows = shard.rows
        for start in range(0, shard.size, self.micro_batch):
            count = max(0, min(self.micro_batch, shard.length - start))
            part = batch.select(rows[start : start + max(1, count)])
            yield part, count / len(batch)


def partition(batch: Batch, updates: int, seed: int) -> Iterator[Batch]:
    """`updates` disjoint random parts of a rollout's rows, one for each update; sizes differ by at most one."""
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    for rows in order.tensor_split(updates):
        if len(rows):
            yield batch.select(rows)


class Ema:
    """`average <- d average + (1 - d) weights` at each update, the n-th with `d = min(decay, (1 + n) / (10 + n))`.

    The warm-up keeps the first averages from being the initial weights. Averages are kept in the parameters' own dtype,
    which is fp32.

    Args:
        parameters: what is trained.
        decay: in (0, 1), per update; or a function that gives d for n = 1, 2, ..., without that warm-up.
    """

    def __init__(self, parameters: Sequence[Parameter], decay: float | Callable[[int], float]) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self._average = WeightSnapshot(self._parameters)
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the current weights."""
        self.updates += 1
        decay = self._decay
        decay = decay(self.updates) if callable(decay) else min(decay, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self._average.values, self._parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - decay)

    def in_place(self) -> AbstractContextManager[None]:
        """Runs its body with the average in place of the weights, which are then restored bit for bit."""
        return self._average.in_place()

    @property
    def values(self) -> Sequence[Tensor]:
        """The averages, in the order of the parameters."""
        return self._average.values

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor], updates: int) -> None:
        """Restores averages that were saved after `updates` updates."""
        for average, value in zip(self._average.values, values, strict=True):
            average.copy_(value)
        self.updates = updates
