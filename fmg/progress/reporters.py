"""Events as plain lines for a pipe, and the choice of the view. Those of a terminal and a notebook are in `live.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

from rich.console import Console

from fmg.core import metric_keys as keys
from fmg.core.display import counted
from fmg.core.events import Evaluated, Event, IterationDone, Notice, Resumed, StageProgress, Started
from fmg.data.run_metrics import headline
from fmg.progress.figures import signed

# Seconds without a line after which a pipe is told where a long stage stands
_HEARTBEAT = 10.0

LOADING = StageProgress("loading", 0, 0)
"""What is reported before torch is imported: nobody knows how long that takes."""


class Reporter(Protocol):
    """An observer with a beginning and an end."""

    def __call__(self, event: Event) -> None:
        """Shows an event, or leaves it out."""

    def __enter__(self) -> Reporter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Stateless:
    """A reporter that leaves nothing to put away."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class PlainReporter(Stateless):
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
            self._line(f"{event.title}, {counted(event.total, 'iteration')}{facts}")
            self._iteration_began = self._clock()
        elif isinstance(event, Resumed):
            for line in event.lines:
                self._first = {**_watched(line), **self._first}
            self._line(event.text)
        elif isinstance(event, StageProgress):
            if self._clock() - self._last_line >= _HEARTBEAT:
                self._line(f"{event.title}: {event.done}/{event.total}" if event.total else f"{event.title} ...")
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
    return {"reward": metrics[keys.REWARD]} if keys.REWARD in metrics else headline(metrics)


def is_interactive(console: Console) -> bool:
    """Whether a person watches: a terminal that can redraw lines, or a notebook."""
    return console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)


def reporter_for(console: Console) -> Reporter:
    """The live view in a terminal or a notebook, else plain lines."""
    if not is_interactive(console):
        return PlainReporter(console)
    from fmg.progress.live import LiveReporter, NotebookReporter

    return NotebookReporter() if console.is_jupyter else LiveReporter(console)
