"""Events as text: plain lines for a pipe, JSON lines for a program. The live view of a terminal is in `live.py`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

from rich.console import Console

from fmg.cli.console import print_error, print_json
from fmg.cli.metrics import signed
from fmg.core.events import Evaluated, Event, IterationDone, Notice, Resumed, StageProgress, Started
from fmg.data.run_metrics import REWARD, headline

# Seconds without a line after which a pipe is told where a long stage stands
_HEARTBEAT = 10.0


LOADING = StageProgress("loading", 0, 0)
"""What a command reports before it imports torch: nobody knows how long that takes."""


def resumed_text(event: Resumed) -> str:
    """What a person is told of it."""
    return f"Resumed after iteration {event.iteration}."


class Reporter(Protocol):
    """An observer with a beginning and an end."""

    def __call__(self, event: Event) -> None:
        """Shows an event, or leaves it out."""

    def __enter__(self) -> Reporter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _Stateless:
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class PlainReporter(_Stateless):
    """One line for each iteration, evaluation and notice; a heartbeat inside long stages.

    Args:
        console: where the lines go.
        clock: seconds; a test passes its own.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._last_line = clock()
        self._iteration_began = self._last_line
        self._first: dict[str, float] = {}

    def __enter__(self) -> PlainReporter:
        return self

    def __call__(self, event: Event) -> None:
        """Prints what a person following a log wants to know of `event`."""
        if isinstance(event, Started):
            facts = "".join(f"\n  {name}: {value}" for name, value in event.facts.items())
            self._line(f"{event.title}, {event.total} iterations{facts}")
            self._iteration_began = self._clock()
        elif isinstance(event, Resumed):
            for line in event.lines:
                self._first = {**_watched(line), **self._first}
            self._line(resumed_text(event))
        elif isinstance(event, StageProgress):
            if self._clock() - self._last_line >= _HEARTBEAT:
                self._line(f"{event.stage}: {event.done}/{event.total}")
        elif isinstance(event, IterationDone):
            took = self._clock() - self._iteration_began
            self._iteration_began = self._clock()
            scores = self._changes(_watched(event.metrics))
            self._line(f"iteration {event.iteration}/{event.total}  {scores}  {took:.1f} s")
        elif isinstance(event, Evaluated):
            self._line(f"held out, after iteration {event.iteration}  {self._changes(_watched(event.metrics))}")
            self._iteration_began = self._clock()
        elif isinstance(event, Notice):
            self._line(f"{event.level}: {event.text}" if event.level != "info" else event.text)

    def _changes(self, scores: Mapping[str, float]) -> str:
        """Values with their difference from the first that the run had of each."""
        parts = []
        for name, value in scores.items():
            change = f" ({signed(value - self._first[name])})" if name in self._first else ""
            self._first.setdefault(name, value)
            parts.append(f"{name} {value:.3f}{change}")
        return "  ".join(parts)

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)
        self._last_line = self._clock()


def _watched(metrics: Mapping[str, float]) -> dict[str, float]:
    """What of a line a person watches: the reward of a rollout, the headline scores of an evaluation."""
    return {"reward": metrics[REWARD]} if REWARD in metrics else headline(metrics)


class JsonReporter(_Stateless):
    """One JSON object a line on stdout, the lines of `metrics.jsonl`; notices go to `notices`."""

    def __init__(self, notices: Console) -> None:
        self._notices = notices

    def __enter__(self) -> JsonReporter:
        return self

    def __call__(self, event: Event) -> None:
        """Prints iterations and evaluations."""
        if isinstance(event, (IterationDone, Evaluated)):
            finite = {key: value if math.isfinite(value) else None for key, value in event.metrics.items()}
            print_json({**finite, "iteration": event.iteration}, indent=None)
        elif isinstance(event, Resumed):
            self._notices.print(f"info: {resumed_text(event)}", soft_wrap=True)
        elif isinstance(event, Notice):
            self._notices.print(f"{event.level}: {event.text}", soft_wrap=True)


class SilentReporter(_Stateless):
    """Shows nothing: for a process whose events another one shows."""

    def __enter__(self) -> SilentReporter:
        return self

    def __call__(self, event: Event) -> None:
        """Leaves it out."""


class Outspoken:
    """A reporter's events, but an error, after which the process may end at once, is written to stderr."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def __call__(self, event: Event) -> None:
        """Shows an event."""
        if isinstance(event, Notice) and event.level == "error":
            # a live view gives the terminal back
            self._reporter.__exit__(None, None, None)
            print_error(event.text)
        else:
            self._reporter(event)


def reporter_for(console: Console) -> Reporter:
    """The live view on a terminal, else plain lines."""
    if console.is_terminal and not console.is_dumb_terminal:
        from fmg.cli.live import LiveReporter

        return LiveReporter(console)
    return PlainReporter(console)
