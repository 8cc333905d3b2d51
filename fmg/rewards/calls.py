"""Rewards that ask another process: several calls at a time, each bounded, and what becomes of those that failed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from fmg.core.errors import RewardError
from fmg.core.types import PartialRewardOutput, RewardOutput
from fmg.rewards.http_client import CallError, RetryPolicy
from fmg.rewards.service_configs import CallConfig

T = TypeVar("T")
Chunk = tuple[slice, Callable[[], RewardOutput]]
"""Rows of a batch, and the call that scores them."""


class Caller:
    """Makes the calls of a reward and applies its failure policy.

    Args:
        name: of the reward, for messages.
        config: bounds and policy.
        advice: what to do when calls fail, one sentence.
    """

    def __init__(self, name: str, config: CallConfig, advice: str) -> None:
        self._name = name
        self._config = config
        self._advice = advice
        self._retry = RetryPolicy(config.retries, config.backoff, config.max_backoff)
        self._fruitless = 0

    def once(self, call: Callable[[], T]) -> T:
        """The result of one call, retried, whatever the policy.

        Raises:
            CallError: when every attempt failed.
        """
        return self._retry.run(call)

    def gather(self, chunks: Sequence[Chunk], prompts: Sequence[str]) -> RewardOutput:
        """The scores of all chunks, which cover the rows of a batch; a chunk is scored by one call or not at all.

        Raises:
            RewardError: naming a prompt. With `stop`: when a call failed for good. With `drop-group`: when one failed
                in a way that another attempt cannot mend, or when `patience` batches in a row got no score at all.
        """
        results = list(zip([rows for rows, _ in chunks], self._run([call for _, call in chunks]), strict=True))
        failed = [(rows, result) for rows, result in results if isinstance(result, CallError)]
        outputs = [(rows, result) for rows, result in results if isinstance(result, RewardOutput)]
        self._fruitless = 0 if outputs or not chunks else self._fruitless + 1
        for rows, error in failed:
            hopeless = self._fruitless >= self._config.patience
            if self._config.on_failure == "stop" or not error.passing or hopeless:
                prompt = prompts[rows.start]
                raise RewardError(
                    f"The reward '{self._name}' has no score for the prompt '{prompt}': {error.reason}", self._advice
                )
        return _joined(outputs, len(prompts))

    def _run(self, calls: Sequence[Callable[[], RewardOutput]]) -> list[RewardOutput | CallError]:
        cancelled = threading.Event()

        def nap(seconds: float) -> None:
            if cancelled.wait(seconds):
                raise CallError("cancelled", passing=False)

        def attempt(call: Callable[[], RewardOutput]) -> RewardOutput | CallError:
            try:
                return self._retry.run(call, nap)
            except CallError as error:
                return error

        pool = ThreadPoolExecutor(self._config.concurrency, thread_name_prefix=f"fmg-{self._name}")
        try:
            return list(pool.map(attempt, calls))
        finally:
            # after Ctrl-C nothing waits for a call that is going on
            cancelled.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _joined(outputs: Sequence[tuple[slice, RewardOutput]], count: int) -> RewardOutput:
    total = torch.full((count,), math.nan)
    scored = torch.zeros(count, dtype=torch.bool)
    parts: dict[str, Tensor] = {}
    for rows, output in outputs:
        total[rows], scored[rows] = output.total, True
        for part, values in output.parts.items():
            parts.setdefault(part, torch.full((count,), math.nan))[rows] = values
    return RewardOutput(total, parts) if bool(scored.all()) else PartialRewardOutput(total, parts, scored)
