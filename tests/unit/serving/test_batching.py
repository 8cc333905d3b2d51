from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from fmg.serving.batching import BatchQueue, BusyError, Limits


@dataclass(frozen=True)
class Word:
    text: str
    images: int = 1

    @property
    def kind(self) -> str:
        return self.text[0]

    def __len__(self) -> int:
        return self.images


class Shouting:
    """Upper case; fails at a question, and waits while the gate is closed."""

    def __init__(self) -> None:
        self.batches: list[str] = []
        self.gate = threading.Event()

    def __call__(self, words: Sequence[Word]) -> list[str]:
        self.gate.wait(30)
        self.batches.append(" ".join(word.text for word in words))
        if any(word.text.endswith("?") for word in words):
            raise ValueError("a question")
        return [word.text.upper() for word in words]


def filled(work: Shouting, texts: str, *, overtaking: bool, max_batch: int = 3) -> list[str]:
    """The batches that a queue makes of words that arrive behind one at work."""
    queue = BatchQueue(work, Limits(max_batch=max_batch), "test", overtaking=overtaking)
    first = queue.submit(Word("x"))
    while not first.running():
        time.sleep(0.001)
    futures = {text: queue.submit(Word(text)) for text in texts.split()}
    work.gate.set()
    assert {text: future.result(30) for text, future in futures.items()} == {text: text.upper() for text in futures}
    assert queue.close(30)
    assert queue.queued == 0
    return work.batches[1:]


def test_consecutive_jobs_of_one_kind_are_a_batch() -> None:
    assert filled(Shouting(), "a1 a2 b1 a3", overtaking=False) == ["a1 a2", "b1", "a3"]


def test_jobs_of_a_kind_overtake_others_but_the_oldest_goes_first() -> None:
    work = Shouting()
    assert filled(work, "a1 b1 a2 b2 a3 a4", overtaking=True) == ["a1 a2 a3", "b1 b2", "a4"]


def test_a_job_larger_than_a_batch_is_computed_alone() -> None:
    work = Shouting()
    work.gate.set()
    queue = BatchQueue(work, Limits(max_batch=2, max_queued=4), "test")
    assert queue.submit(Word("a", images=9)).result(30) == "A"
    assert queue.close(30)


def test_a_call_runs_between_batches_and_its_error_is_its_own() -> None:
    work = Shouting()
    queue = BatchQueue(work, Limits(max_batch=1), "test")
    first, second = queue.submit(Word("a1")), queue.submit(Word("a2"))
    seen = queue.between(lambda: " | ".join(work.batches))
    failed = queue.between(lambda: "x"[1])
    work.gate.set()
    assert seen.result(30) in ("", "a1")
    assert isinstance(failed.exception(30), IndexError)
    assert (first.result(30), second.result(30)) == ("A1", "A2")
    assert queue.close(30)
    with pytest.raises(BusyError):
        queue.between(lambda: "too late")


def test_a_cancelled_job_makes_room_at_once() -> None:
    work = Shouting()
    queue = BatchQueue(work, Limits(max_batch=1, max_queued=3), "test")
    first = queue.submit(Word("a"))
    while not first.running():
        time.sleep(0.001)
    second = queue.submit(Word("b", images=2))
    with pytest.raises(BusyError):
        queue.submit(Word("c"))
    assert second.cancel()
    third = queue.submit(Word("c"))
    work.gate.set()
    assert third.result(30) == "C"
    assert queue.close(30)
    assert work.batches == ["a", "c"]


def test_closing_gives_up_on_a_batch_that_does_not_end() -> None:
    work = Shouting()
    queue = BatchQueue(work, Limits(), "test")
    queue.submit(Word("a"))
    assert not queue.close(0.05)
    work.gate.set()
    assert queue.close(30)
