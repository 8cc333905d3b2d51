"""Whether the other processes of a run are still there. A process that is killed cannot say so; its silence does.

Each process counts up a number in the store that they met through. The first watches all others, they watch the first,
and the first to notice something leaves the verdict for all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

BEAT = 1.0
"""Seconds between two signs of life."""
PATIENCE = 30.0
"""Seconds of silence after which a process counts as gone."""
_VERDICT = "verdict"


class Store(Protocol):
    """The part of `torch.distributed.Store` that is needed."""

    def add(self, key: str, value: int, /) -> int:
        """Adds to a counter that begins at 0."""

    def set(self, key: str, value: str, /) -> None:
        """Writes a value."""

    def get(self, key: str, /) -> bytes:
        """Reads a value."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys have been written."""


class Heartbeat:
    """Signs of life of this process, and a watch on the others, in a thread of its own.

    Args:
        store: shared by all processes; used by the thread alone once it has started.
        rank: of this process.
        count: of processes.
        on_lost: called in the thread, once, with a sentence that says which process ended and how.
        beat: seconds between two signs of life.
        patience: seconds of silence after which a process counts as gone.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        count: int,
        on_lost: Callable[[str], None],
        *,
        beat: float = BEAT,
        patience: float = PATIENCE,
    ) -> None:
        self._store = store
        self._rank = rank
        self._count = count
        self._on_lost = on_lost
        self._beat = beat
        self._patience = patience
        self._stopped = threading.Event()
        self._seen: dict[int, tuple[int, int]] = {}
        self._thread = threading.Thread(target=self._watch, name="fmg-heartbeat", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, which leaves the store to the caller."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def leave(self, last_words: str | None = None) -> None:
        """Tells the others, after `stop`, that this process is done, or with `last_words` why it failed."""
        try:
            if last_words is None:
                self._store.add(f"done/{self._rank}", 1)
            elif not self._store.check([_VERDICT]):
                self._store.set(_VERDICT, last_words)
                # they look once a beat, and the store goes away with the process that keeps it
                time.sleep(2 * self._beat)
        except Exception:
            # a store that is gone: there is nobody left to tell, or they know
            return

    def diagnose(self) -> str | None:
        """Which process ended, asked after a connection broke: a verdict, or who was silent for a few beats.

        Only after `stop`.
        """
        peers = [rank for rank in range(self._count) if rank != self._rank]
        try:
            before = {rank: self._store.add(f"beat/{rank}", 0) for rank in peers}
            for _ in range(4):
                time.sleep(self._beat)
                if self._store.check([_VERDICT]):
                    return self._store.get(_VERDICT).decode()
            silent = [rank for rank in peers if self._store.add(f"beat/{rank}", 0) == before[rank]]
        except Exception:
            return self._store_gone()
        return self._ended(silent[0]) if silent else None

    def _watch(self) -> None:
        watched = range(1, self._count) if self._rank == 0 else (0,)
        while not self._stopped.wait(self._beat):
            try:
                verdict = self._look(watched)
            except Exception:
                verdict = self._store_gone()
            if verdict is not None and not self._stopped.is_set():
                self._on_lost(verdict)
                return

    def _look(self, watched: Sequence[int]) -> str | None:
        self._store.add(f"beat/{self._rank}", 1)
        if self._store.check([_VERDICT]):
            return self._store.get(_VERDICT).decode()
        for rank in watched:
            if self._is_silent(rank) and not self._store.add(f"done/{rank}", 0):
                verdict = self._ended(rank)
                self._store.set(_VERDICT, verdict)
                return verdict
        return None

    def _is_silent(self, rank: int) -> bool:
        # counted in looks, not on a clock: a machine that slept has lost nobody
        beats = self._store.add(f"beat/{rank}", 0)
        before, looks = self._seen.get(rank, (-1, 0))
        self._seen[rank] = (beats, looks + 1 if beats == before else 0)
        return self._seen[rank][1] * self._beat > self._patience

    def _ended(self, rank: int) -> str:
        return f"Process {rank} of {self._count} (counted from 0) ended without a word"

    def _store_gone(self) -> str:
        return self._ended(0)
