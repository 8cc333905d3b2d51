"""Scores requests of several clients together, on the queue that all servers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from fmg.core.types import RewardOutput
from fmg.rewards.base import Checked, select_rows
from fmg.rewards.service.wire import ScoreRequest
from fmg.serving import batching
from fmg.serving.batching import BatchQueue, BusyError

Scores = dict[str, RewardOutput]


@dataclass(frozen=True)
class Limits(batching.Limits):
    """Limits of the server.

    Attributes:
        max_images: images of a request.
        max_pixels: pixels of an image.
    """

    max_images: int = 256
    max_pixels: int = 4096 * 4096


@dataclass(frozen=True)
class _Job:
    request: ScoreRequest
    names: tuple[str, ...]

    @property
    def kind(self) -> tuple[object, ...]:
        """Images of one size, for the same rewards, can be scored together."""
        return (tuple(self.request.images.shape[1:]), self.names)

    def __len__(self) -> int:
        return len(self.request.prompts)


class Batcher:
    """Scores requests on its own thread. Consecutive requests for the same rewards and image size are one batch.

    Args:
        rewards: rewards by name.
        limits: bounds of queue and batch.
        device: where images are scored.
    """

    def __init__(self, rewards: Mapping[str, Checked], limits: Limits, device: torch.device) -> None:
        self._rewards = rewards
        self._device = device
        self._queue: BatchQueue[_Job, Scores] = BatchQueue(self._score, limits, "fmg-reward-batcher")

    @property
    def queued(self) -> int:
        """Images that wait or are being scored."""
        return self._queue.queued

    def submit(self, request: ScoreRequest) -> Future[Scores]:
        """The future scores of a request. Cancelling it takes the request out of the queue if it still waits.

        Raises:
            BusyError: there is no room for it.
        """
        return self._queue.submit(_Job(request, request.rewards or tuple(self._rewards)))

    def close(self, timeout: float | None = None) -> bool:
        """Scores what is queued, accepts nothing more, and ends the thread; False if it did not end in time."""
        return self._queue.close(timeout)

    def _score(self, jobs: Sequence[_Job]) -> list[Scores]:
        images = torch.cat([job.request.images for job in jobs]).to(self._device)
        prompts = [prompt for job in jobs for prompt in job.request.prompts]
        scores = {name: self._rewards[name](images, prompts) for name in jobs[0].names}
        parts, start = [], 0
        for job in jobs:
            rows = slice(start, start + len(job))
            start = rows.stop
            parts.append({name: select_rows(output, rows) for name, output in scores.items()})
        return parts


__all__ = ["Batcher", "BusyError", "Limits", "Scores"]
