"""The signals that end a run cleanly, as Ctrl-C does: SIGINT, SIGTERM, SIGHUP and SIGUSR1. Standard library only.

Terminals, SLURM, Kubernetes and spot machines send them. The first one ends the work at the next point where nothing is
lost; a second one ends it at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CAUGHT = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, n))
_ECHO = 1.0
"""Seconds within which a second signal counts as the first: a launcher forwards what the terminal has sent to all."""


class Interruption(KeyboardInterrupt):
    """A signal that ends the work cleanly.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal_name(number))
        self.number = number


def signal_of(error: KeyboardInterrupt) -> int:
    """The number of the signal behind an interruption; that of Ctrl-C if unknown."""
    return error.number if isinstance(error, Interruption) else int(signal.SIGINT)


def signal_name(number: int) -> str:
    """`SIGTERM`, for example."""
    return signal.Signals(number).name


def exit_code(number: int) -> int:
    """The exit code of a process that a signal ended, as shells state it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


class Signals:
    """The interruption that signals have requested, and whether it takes effect at once.

    Attributes:
        at_once: whether a signal raises where the process is; several processes stop at one point that they agree on.
        asked: number of the first signal, 0 before it.
    """

    def __init__(self) -> None:
        self.at_once = True
        self.asked = 0
        self._first = 0.0
        self._held = 0
        self._raised = False
        self._before: dict[int, object] = {}

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handles the signals for the length of the body, which gets an `Interruption`. Only in the main thread.

        A signal that is ignored stays ignored, so `nohup` works.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        for number in CAUGHT:
            # None is a handler that was not set by Python
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._hear)
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def held(self) -> Iterator[None]:
        """A body that the first signal does not interrupt: it is raised at the end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.asked and self.at_once and not self._held and not self._raised:
            self._raised = True
            raise Interruption(self.asked)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._first = number, time.monotonic()
            if self.at_once and not self._held:
                self._raised = True
                raise Interruption(number)
        elif time.monotonic() - self._first > _ECHO:
            # a third signal goes to the original handlers
            self._release()
            raise Interruption(number)

    def _release(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
