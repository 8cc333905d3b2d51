"""Reporters that only commands need: JSON lines for a program, silence, and errors that must be seen."""

from __future__ import annotations

import math

from rich.console import Console

from fmg.cli.console import print_error, print_json
from fmg.core.events import Evaluated, Event, IterationDone, Notice, Resumed
from fmg.progress.reporters import Reporter, Stateless


class JsonReporter(Stateless):
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
            self._notices.print(f"info: {event.text}", soft_wrap=True)
        elif isinstance(event, Notice):
            self._notices.print(f"{event.level}: {event.text}", soft_wrap=True)


class SilentReporter(Stateless):
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
