"""Learning-rate schedules: diffusers' functions, evaluated at the index of an update.

Like noise and prompts, the rate depends only on the position in the run, so a resumed or distributed run needs no state
for it. An update that is skipped (`objective.target_kl`, equal rewards) keeps its position: the rate reaches 0 at the
end of the last iteration, however many updates were made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import SGD, Optimizer

from fmg.core.errors import UsageError
from fmg.recipe.sections import TrainSection

_IN_DIFFUSERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def lr_factor(train: TrainSection) -> Callable[[int], float]:
    """The learning rate of update `u = 0, 1, ...` as a factor of `optimizer.lr`.

    It is diffusers' schedule, shifted by one step and one step longer. So the first update of a warm-up has an effect
    (diffusers gives it the rate 0), update `train.lr_warmup_steps` has the full rate, and the last one still learns
    from its rollout. Without a warm-up the first update has the full rate, exactly as in diffusers.
    """
    from diffusers.optimization import get_scheduler

    scheduler = get_scheduler(
        _IN_DIFFUSERS[train.lr_schedule],
        SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=max(1, train.lr_warmup_steps),
        num_training_steps=train.updates + 1,
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return lambda update: factor(update + 1)


class LrSchedule:
    """Sets the learning rate of a run's optimizer before each update.

    Args:
        optimizer: the optimizer of the run, with the rates of its recipe.
        train: training section with the schedule and the number of updates.

    Raises:
        UsageError: the optimizer has no learning rate to schedule.
    """

    def __init__(self, optimizer: Optimizer, train: TrainSection) -> None:
        self._optimizer = optimizer
        self._rates: list[float] = []
        if train.lr_schedule == "constant" and train.lr_warmup_steps <= 1:
            return
        if any("lr" not in group for group in optimizer.param_groups):
            raise UsageError(
                "The optimizer has no learning rate (`lr`) that train.lr_schedule could change",
                "Set train.lr_schedule to constant and train.lr_warmup_steps to 0, or use another optimizer.",
            )
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._factor = lr_factor(train)

    def set(self, update: int) -> None:
        """Gives the optimizer the learning rate of an update, counted from 0."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False):
            group["lr"] = self._factor(update) * rate

    def rate(self, update: int) -> float | None:
        """The learning rate of an update, in the first parameter group; None if the optimizer has none."""
        if self._rates:
            return self._factor(update) * self._rates[0]
        return self._optimizer.param_groups[0].get("lr")
