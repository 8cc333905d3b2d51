"""The watch on other processes, over a store of this process: beats of milliseconds, and nobody has to be killed."""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict

import pytest

from fmg.training.heartbeat import Heartbeat

BEAT, PATIENCE = 0.02, 0.5


class MemoryStore:
    """As `torch.distributed.Store`; `gone` makes every operation fail, as when the process that keeps it ends."""

    def __init__(self) -> None:
        self.gone = False
        self._counters: defaultdict[str, int] = defaultdict(int)
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, key: str, value: int, /) -> int:
        self._reach()
        with self._lock:
            self._counters[key] += value
            return self._counters[key]

    def set(self, key: str, value: str, /) -> None:
        self._reach()
        self._values[key] = value

    def get(self, key: str, /) -> bytes:
        self._reach()
        return self._values[key].encode()

    def check(self, keys: list[str], /) -> bool:
        self._reach()
        return all(key in self._values for key in keys)

    def _reach(self) -> None:
        if self.gone:
            raise ConnectionError("the other end is gone")


class Pack:
    """Heartbeats over one store, and what each was told."""

    def __init__(self, count: int, running: int) -> None:
        self.store = MemoryStore()
        self.told: list[queue.Queue[str]] = [queue.Queue() for _ in range(count)]
        self.beats = [
            Heartbeat(self.store, rank, count, self.told[rank].put, beat=BEAT, patience=PATIENCE)
            for rank in range(running)
        ]
        for beat in self.beats:
            beat.start()

    def verdicts(self) -> list[str]:
        return [self.told[rank].get(timeout=30) for rank in range(len(self.beats))]

    def stop(self) -> None:
        for beat in self.beats:
            beat.stop()


def test_nobody_is_lost_while_all_beat_or_after_they_said_goodbye() -> None:
    pack = Pack(3, running=3)
    time.sleep(PATIENCE)
    pack.beats[2].stop()
    pack.beats[2].leave()
    time.sleep(2 * PATIENCE)
    pack.stop()
    assert all(told.empty() for told in pack.told)


def test_all_hear_of_one_that_is_silent() -> None:
    pack = Pack(3, running=2)
    verdicts = pack.verdicts()
    pack.stop()
    assert set(verdicts) == {"Process 2 of 3 (counted from 0) ended without a word"}


def test_all_hear_the_last_words_of_one_that_fails() -> None:
    pack = Pack(3, running=3)
    pack.beats[1].stop()
    pack.beats[1].leave("Process 1 of 3 stopped: out of memory")
    told = [pack.told[rank].get(timeout=30) for rank in (0, 2)]
    pack.stop()
    assert told == ["Process 1 of 3 stopped: out of memory"] * 2


def test_a_store_that_is_gone_went_with_the_first_process() -> None:
    pack = Pack(2, running=2)
    pack.store.gone = True
    verdict = pack.told[1].get(timeout=30)
    pack.stop()
    assert verdict == "Process 0 of 2 (counted from 0) ended without a word"


@pytest.mark.parametrize("running", [1, 2])
def test_a_broken_connection_is_told_from_an_error_of_ones_own(running: int) -> None:
    pack = Pack(2, running)
    time.sleep(2 * BEAT)
    pack.beats[0].stop()
    lost = pack.beats[0].diagnose()
    pack.stop()
    assert lost == (None if running == 2 else "Process 1 of 2 (counted from 0) ended without a word")
