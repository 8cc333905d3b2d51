"""A signal ends the work at a point where nothing is lost; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fmg.core import signals as module
from fmg.core.signals import CAUGHT, Interruption, Signals, exit_code, signal_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")


@pytest.fixture
def before() -> Iterator[list[object]]:
    # a shell ignores them in background jobs, and an ignored signal stays ignored
    outside = [signal.signal(number, signal.SIG_DFL) for number in CAUGHT]
    found = [signal.getsignal(number) for number in CAUGHT]
    yield found
    assert [signal.getsignal(number) for number in CAUGHT] == found
    for number, handler in zip(CAUGHT, outside, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", CAUGHT)
def test_a_signal_interrupts_and_names_itself(number: int, before: list[object]) -> None:
    signals = Signals()
    with pytest.raises(KeyboardInterrupt) as caught, signals.caught():
        os.kill(os.getpid(), number)
    assert signal_of(caught.value) == signals.asked == number


def test_what_is_held_is_finished_first(before: list[object]) -> None:
    signals, done = Signals(), []

    def work() -> None:
        with signals.caught(), signals.held():
            with signals.held():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("inner")
            done.append("outer")

    with pytest.raises(Interruption):
        work()
    assert done == ["inner", "outer"]
    # the shutdown is not interrupted again
    with signals.held():
        pass


def test_a_second_signal_ends_at_once_and_an_echo_does_not(
    before: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, now = Signals(), [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def work() -> None:
        with signals.caught(), signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
            now[0] += 0.5
            os.kill(os.getpid(), signal.SIGINT)
            now[0] += 1.0
            os.kill(os.getpid(), signal.SIGHUP)
            pytest.fail("the third was not heard")

    with pytest.raises(Interruption) as caught:
        work()
    assert caught.value.number == signal.SIGHUP


def test_several_processes_stop_where_they_agree(before: list[object]) -> None:
    signals = Signals()
    signals.at_once = False
    with signals.caught(), signals.held():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signals.asked == signal.SIGUSR1


def test_ignored_signals_stay_ignored() -> None:
    program = (
        "import os, signal; from fmg.core.signals import Signals\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with Signals().caught(): os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "alive\n"


def test_exit_codes_are_those_of_shells() -> None:
    assert (exit_code(signal.SIGINT), exit_code(signal.SIGTERM), exit_code(signal.SIGHUP)) == (130, 143, 129)
    assert signal_of(KeyboardInterrupt()) == signal.SIGINT
