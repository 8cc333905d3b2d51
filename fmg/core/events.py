"""Progress as values: long work reports to an observer, and only the command line turns events into text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Started:
    """A run begins. `total` is the number of iterations, `facts` is what a person wants to see first."""

    title: str
    total: int
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Resumed:
    """A run resumes after `iteration`. `lines` are those of its `metrics.jsonl` so far, null as NaN."""

    iteration: int
    lines: tuple[Mapping[str, float], ...]

    @property
    def text(self) -> str:
        """The message for a person."""
        return f"Resumed after iteration {self.iteration}."


@dataclass(frozen=True)
class StageProgress:
    """Work inside one stage (`loading`, `rollout`, `evaluation`, ...): `done` of `total` units.

    A total of 0 means unknown. `what` names the object of the work.
    """

    stage: str
    done: int
    total: int
    what: str = ""

    @property
    def title(self) -> str:
        """Stage and object, for a person."""
        return f"{self.stage} {self.what}".rstrip()


@dataclass(frozen=True)
class IterationDone:
    """One training iteration is over; `metrics` are the values of its line in `metrics.jsonl`."""

    iteration: int
    total: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation on held-out prompts is over; `metrics` are the values of its line in `metrics.jsonl`."""

    iteration: int
    metrics: Mapping[str, float]
    grid: Path | None


@dataclass(frozen=True)
class Notice:
    """Something a person should know. `level` is `info`, `warning`, or `error` just before a process has to end."""

    level: str
    text: str


@dataclass(frozen=True)
class Finished:
    """A run is over. `interrupted` is true when the user stopped it and everything was saved."""

    run: Path
    interrupted: bool
    summary: Mapping[str, float]


Event = Started | Resumed | StageProgress | IterationDone | Evaluated | Notice | Finished
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An observer that ignores every event."""
