"""The scoring thread: joins requests of several clients into batches, and refuses requests while its queue is full."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from fmg.core.types import RewardOutput
from fmg.rewards.base import Checked, select_rows
from fmg.rewards.service.wire import ScoreRequest

Scores = dict[str, RewardOutput]

# Assumed time of an image until one has been measured.
_FIRST_GUESS_S = 0.1
_SMOOTHING = 0.2


@dataclass(frozen=True)
class Limits:
    """What the server accepts.

    Attributes:
        max_body: bytes of a request.
        max_images: images of a request.
        max_pixels: pixels of an image.
        max_queued: images that wait or are being scored; more are refused until some are done.
        max_batch: requests are joined up to this many images.
        gather: seconds to wait for further requests after the first.
        timeout: seconds that a request may take to arrive, and again to be scored.
    """

    max_body: int = 256 << 20
    max_images: int = 256
    max_pixels: int = 4096 * 4096
    max_queued: int = 1024
    max_batch: int = 64
    gather: float = 0.005
    timeout: float = 300.0


class BusyError(Exception):
    """The queue is full.

    Args:
        retry_after: whole seconds after which there may be room.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


@dataclass
class _Job:
    request: ScoreRequest
    names: tuple[str, ...]
    result: Future[Scores] = field(default_factory=Future)

    @property
    def kind(self) -> tuple[object, ...]:
        """Jobs of one kind can be scored together."""
        return (tuple(self.request.images.shape[1:]), self.names)

    def __len__(self) -> int:
        return len(self.request.prompts)


class Batcher:
    """Scores requests on its own thread, in the order of arrival.

    Consecutive requests for the same rewards and image size are scored as one batch. When a batch fails, each of its
    requests is scored alone, so that one client's prompt cannot fail another's.

    Args:
        rewards: by name.
        limits: bounds of queue and batch.
        device: where images are scored.
    """

    def __init__(self, rewards: Mapping[str, Checked], limits: Limits, device: torch.device) -> None:
        self._rewards = rewards
        self._device = device
        self._limits = limits
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._images = 0
        self._seconds_per_image = _FIRST_GUESS_S
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="fmg-reward-batcher", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Images that wait or are being scored."""
        return self._images

    def submit(self, request: ScoreRequest) -> Future[Scores]:
        """The future scores of a request. Cancelling it takes the request out of the queue if it still waits.

        Raises:
            BusyError: there is no room for it.
        """
        job = _Job(request, request.rewards or tuple(self._rewards))
        with self._changed:
            if self._closed or (self._images and self._images + len(job) > self._limits.max_queued):
                raise BusyError(max(1, round(self._images * self._seconds_per_image)))
            self._images += len(job)
            self._jobs.append(job)
            self._changed.notify()
        return job.result

    def close(self) -> None:
        """Scores what is queued, accepts nothing more, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            live = [job for job in batch if job.result.set_running_or_notify_cancel()]
            started = time.perf_counter()
            if live:
                self._score(live)
            images = sum(map(len, batch))
            with self._changed:
                self._images -= images
                spent = (time.perf_counter() - started) / images
                self._seconds_per_image += _SMOOTHING * (spent - self._seconds_per_image)

    def _next_batch(self) -> list[_Job]:
        """Consecutive jobs of one kind, at least one; empty when closed."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._jobs) or self._closed)
            if not self._jobs:
                return []
            self._changed.wait_for(self._batch_is_full, timeout=self._limits.gather)
            batch = [self._jobs.popleft()]
            size = len(batch[0])
            while self._jobs and self._jobs[0].kind == batch[0].kind:
                size += len(self._jobs[0])
                if size > self._limits.max_batch:
                    break
                batch.append(self._jobs.popleft())
            return batch

    def _batch_is_full(self) -> bool:
        return self._closed or self._images >= self._limits.max_batch

    def _score(self, jobs: Sequence[_Job]) -> None:
        try:
            images = torch.cat([job.request.images for job in jobs]).to(self._device)
            prompts = [prompt for job in jobs for prompt in job.request.prompts]
            scores = {name: self._rewards[name](images, prompts) for name in jobs[0].names}
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].result.set_exception(error)
            else:
                for job in jobs:
                    self._score([job])
            return
        start = 0
        for job in jobs:
            rows = slice(start, start + len(job))
            start = rows.stop
            job.result.set_result({name: select_rows(output, rows) for name, output in scores.items()})
