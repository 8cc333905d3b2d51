from __future__ import annotations

from collections.abc import Callable

import pytest

from fmg.core.profiling import OTHER, TEXT_ENCODERS, TOKENISE, TOTAL, StageClock, stage, wall_clock


def ticking() -> tuple[StageClock[int], Callable[[int], None]]:
    """A clock of whole milliseconds that the test moves."""
    now = [0]

    def pass_time(milliseconds: int) -> None:
        now[0] += milliseconds

    return StageClock(lambda: now[0], lambda begin, end: float(end - begin)), pass_time


def test_every_millisecond_belongs_to_the_innermost_stage() -> None:
    clock, pass_time = ticking()
    with clock.running():
        pass_time(1)
        with stage(TEXT_ENCODERS):
            pass_time(2)
            with stage(TOKENISE):
                pass_time(4)
            pass_time(8)
        pass_time(16)
        with stage(TOKENISE):
            pass_time(32)
    pass_time(64)
    assert clock.spent() == {TOKENISE: 36.0, TEXT_ENCODERS: 10.0, OTHER: 17.0, TOTAL: 63.0}


def test_a_clock_that_runs_twice_adds_up() -> None:
    clock, pass_time = ticking()
    for _ in range(2):
        with clock.running(), stage("mine"):
            pass_time(3)
        pass_time(100)
    assert clock.spent() == {OTHER: 0.0, "mine": 6.0, TOTAL: 6.0}


def failing(pass_time: Callable[[int], None]) -> None:
    with stage(TOKENISE):
        pass_time(1)
        raise KeyError


def test_a_stage_that_fails_ends() -> None:
    clock, pass_time = ticking()
    with clock.running():
        with pytest.raises(KeyError):
            failing(pass_time)
        pass_time(2)
    assert clock.spent() == {TOKENISE: 1.0, OTHER: 2.0, TOTAL: 3.0}


def test_without_a_clock_a_stage_is_nothing() -> None:
    with stage(TOKENISE):
        pass
    clock = wall_clock()
    assert clock.spent() == {TOTAL: 0.0}
