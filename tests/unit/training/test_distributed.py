"""Shards of rows, single-process collectives, and heartbeats over a store in memory (no process has to be killed)."""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmg.core.errors import RewardError
from fmg.training.distributed import DistContext, Heartbeat, Shard


@given(total=st.integers(1, 200), count=st.integers(1, 20), unit=st.integers(1, 30))
def test_shards_are_in_order_of_equally_many_calls_and_complete(total: int, count: int, unit: int) -> None:
    shares = [Shard(total, rank, count, unit) for rank in range(count)]
    calls = [[rows.tolist() for rows in share.rows.split(unit)] for share in shares]
    assert {len(made) for made in calls} == {shares[0].calls}
    assert [row for share in shares for row in share.rows[: share.length].tolist()] == list(range(total))
    # a padded shard, whose padding `DistContext.gather` removes
    joined = [row for share in shares for row in [*share.rows.tolist(), *[0] * (share.size - len(share.rows))]]
    assert joined[:total] == list(range(total))
    # whole calls are those of one process alone
    alone = [rows.tolist() for rows in torch.arange(total).split(unit)]
    full = [rows for share, made in zip(shares, calls, strict=True) for rows in made[: share.length // unit]]
    assert full == [rows for rows in alone if len(rows) == unit]


def test_one_process_gets_back_what_it_gave() -> None:
    alone = DistContext()
    rows = torch.arange(3.0)
    assert alone.gather(rows, 3) is rows
    assert (alone.is_distributed, alone.is_main_process) == (False, True)
    assert (alone.gather_texts("a"), alone.max(2.0)) == (["a"], 2.0)
    assert alone.reduce({"loss": 1.0, "ratio_max": 3.0}) == {"loss": 1.0, "ratio_max": 3.0}
    assert alone.run_on_main(lambda: None) == ""
    alone.check_stop()


def test_an_error_of_one_process_alone_is_raised_as_it_is() -> None:
    def fail() -> None:
        raise error

    error = RewardError("It failed", "Repair it.")
    with pytest.raises(RewardError) as raised:
        DistContext().run_on_all(fail)
    assert raised.value is error
    assert not error.reported


BEAT, PATIENCE = 0.02, 0.5


class MemoryStore:
    """Like `torch.distributed.Store`; `gone` makes every operation fail, as when the process that hosts it ends."""

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
    """Heartbeats over one store, and the messages that each received."""

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


def test_no_process_is_lost_while_all_send_heartbeats_or_have_ended_cleanly() -> None:
    pack = Pack(3, running=3)
    time.sleep(PATIENCE)
    pack.beats[2].stop()
    pack.beats[2].leave()
    time.sleep(2 * PATIENCE)
    pack.stop()
    assert all(told.empty() for told in pack.told)


def test_all_are_told_of_a_silent_process() -> None:
    pack = Pack(3, running=2)
    verdicts = pack.verdicts()
    pack.stop()
    assert set(verdicts) == {"Process 2 of 3 (counted from 0) died without reporting an error"}


def test_all_are_told_the_error_of_a_failing_process() -> None:
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
    assert verdict == "Process 0 of 2 (counted from 0) died without reporting an error"


@pytest.mark.parametrize("running", [1, 2])
def test_a_broken_connection_is_distinguished_from_a_local_error(running: int) -> None:
    pack = Pack(2, running)
    time.sleep(2 * BEAT)
    pack.beats[0].stop()
    lost = pack.beats[0].diagnose()
    pack.stop()
    assert lost == (None if running == 2 else "Process 1 of 2 (counted from 0) died without reporting an error")
