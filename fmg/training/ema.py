"""The exponential moving average of what is trained, evaluated and saved beside the raw weights, never instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import Parameter

from fmg.core import metric_keys as keys
from fmg.models.common.adapter import WeightSnapshot


class Ema:
    """`average <- d average + (1 - d) weights` after each optimizer step, with `d = min(decay, (1 + n) / (10 + n))`.

    The warm-up (n counts updates) keeps the first averages from being the initial weights. Averages are kept in the
    parameters' own dtype, which is fp32.

    Args:
        parameters: what is trained.
        decay: in (0, 1), of one update, not of one iteration.
    """

    def __init__(self, parameters: Sequence[Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self._average = WeightSnapshot(self._parameters)
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the present weights."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self._average.values, self._parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - decay)

    def in_place(self) -> AbstractContextManager[None]:
        """A body that runs with the average in place of the weights, which come back bit for bit."""
        return self._average.in_place()

    @property
    def values(self) -> Sequence[Tensor]:
        """The averages, in the order of the parameters."""
        return self._average.values

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor], updates: int) -> None:
        """Takes over averages that were saved after `updates` updates."""
        for average, value in zip(self._average.values, values, strict=True):
            average.copy_(value)
        self.updates = updates


def averaged_keys(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of an evaluation of the average: `eval/...` becomes `eval_ema/...`."""
    return {
        keys.EVAL_EMA + key.removeprefix(keys.EVAL): value
        for key, value in metrics.items()
        if key.startswith(keys.EVAL)
    }
