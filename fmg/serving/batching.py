"""The working thread of a server: joins requests of several clients into batches, and refuses while its queue is full.

Standard library only.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

# Assumed time of an image until one has been measured.
_FIRST_GUESS_S = 0.1
_SMOOTHING = 0.2


@dataclass(frozen=True)
class Limits:
    """Limits of every server.

    Attributes:
        max_body: bytes per request.
        max_queued: images that wait or are being computed; more are refused until some are done.
        max_batch: requests are joined up to this many images.
        gather: seconds to wait for further requests after the first.
        timeout: seconds that a request may take to arrive, and again to be answered.
    """

    max_body: int = 256 << 20
    max_queued: int = 1024
    max_batch: int = 64
    gather: float = 0.005
    timeout: float = 300.0


class Job(Protocol):
    """The work of one request. Its length is its number of images."""

    @property
    def kind(self) -> Hashable:
        """Jobs with equal kinds can be computed together."""

    def __len__(self) -> int: ...


J = TypeVar("J", bound=Job)
R = TypeVar("R")
V = TypeVar("V")


class BusyError(Exception):
    """The queue is full.

    Args:
        retry_after: whole seconds after which there may be room.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


@dataclass(eq=False)
class _Entry(Generic[J, R]):
    job: J
    result: Future[R] = field(default_factory=Future)


class BatchQueue(Generic[J, R]):
    """Computes jobs on its own thread, in the order of arrival, several of one kind together.

    When a batch fails, each of its jobs is computed alone, so that one client's request cannot fail another's.

    Args:
        work: computes the results of a batch, one for each job.
        limits: limits of queue and batch.
        name: name of the thread.
        overtaking: whether a batch also takes jobs of its kind from behind others. The oldest job always goes first, so
            none waits forever. Without it a batch has consecutive jobs.
    """

    def __init__(
        self, work: Callable[[Sequence[J]], Sequence[R]], limits: Limits, name: str, *, overtaking: bool = False
    ) -> None:
        self._work = work
        self._limits = limits
        self._overtaking = overtaking
        self._waiting: deque[_Entry[J, R]] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._images = 0
        self._seconds_per_image = _FIRST_GUESS_S
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Images that wait or are being computed."""
        return self._images

    def submit(self, job: J) -> Future[R]:
        """The future result of a job. Cancelling it takes the job out of the queue if it still waits.

        Raises:
            BusyError: there is no room for it.
        """
        entry: _Entry[J, R] = _Entry(job)
        with self._changed:
            if self._closed or (self._images and self._images + len(job) > self._limits.max_queued):
                raise BusyError(max(1, round(self._images * self._seconds_per_image)))
            self._images += len(job)
            self._waiting.append(entry)
            self._changed.notify()
        entry.result.add_done_callback(lambda result: self._forget(entry) if result.cancelled() else None)
        return entry.result

    def between(self, call: Callable[[], V]) -> Future[V]:
        """The future result of `call`, which the thread runs between two batches.

        Raises:
            BusyError: the queue is closed.
        """
        result: Future[V] = Future()
        with self._changed:
            if self._closed:
                raise BusyError(1)
            self._calls.append((call, result))
            self._changed.notify()
        return result

    def close(self, timeout: float | None = None) -> bool:
        """Computes what is queued, accepts nothing more, and ends the thread; False if it did not end in time."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _forget(self, entry: _Entry[J, R]) -> None:
        with self._changed:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._images -= len(entry.job)

    def _run(self) -> None:
        while batch := self._next_batch():
            live = [entry for entry in batch if entry.result.set_running_or_notify_cancel()]
            started = time.perf_counter()
            if live:
                self._compute(live)
            images = sum(len(entry.job) for entry in batch)
            with self._changed:
                self._images -= images
                if live:
                    spent = (time.perf_counter() - started) / images
                    self._seconds_per_image += _SMOOTHING * (spent - self._seconds_per_image)

    def _next_batch(self) -> list[_Entry[J, R]]:
        """Jobs of one kind, at least one; empty when closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting or self._calls or self._closed))
                if not self._calls:
                    if not self._waiting:
                        return []
                    self._changed.wait_for(self._batch_is_full, timeout=self._limits.gather)
                    if batch := self._take():
                        return batch
                    continue
                call, result = self._calls.popleft()
            _answer(call, result)

    def _take(self) -> list[_Entry[J, R]]:
        """Takes the next batch out of the queue; empty if its clients disconnected while it was gathered."""
        batch: list[_Entry[J, R]] = []
        size = 0
        for entry in list(self._waiting):
            fits = not batch or (
                entry.job.kind == batch[0].job.kind and size + len(entry.job) <= self._limits.max_batch
            )
            if fits:
                self._waiting.remove(entry)
                batch.append(entry)
                size += len(entry.job)
            elif not self._overtaking:
                break
            if size >= self._limits.max_batch:
                break
        return batch

    def _batch_is_full(self) -> bool:
        return self._closed or bool(self._calls) or self._images >= self._limits.max_batch

    def _compute(self, entries: Sequence[_Entry[J, R]]) -> None:
        try:
            results = self._work([entry.job for entry in entries])
        except Exception as error:
            if len(entries) == 1:
                entries[0].result.set_exception(error)
            else:
                for entry in entries:
                    self._compute([entry])
            return
        for entry, result in zip(entries, results, strict=True):
            entry.result.set_result(result)


def _answer(call: Callable[[], Any], result: Future[Any]) -> None:
    if not result.set_running_or_notify_cancel():
        return
    try:
        result.set_result(call())
    except Exception as error:
        result.set_exception(error)
