"""Where the time of a call goes: code names its stages, and a clock around it collects their times.

Without a clock a stage costs one look-up of a context variable, so encoders, samplers and decoders always name theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, Generic, TypeVar

TOKENISE = "tokenise"
TEXT_ENCODERS = "text_encoders"
NOISE = "noise"
TRANSFORMER = "transformer"
VAE = "vae"
SAMPLER = "sampler"
"""All steps of the transformer and the decoder in one call."""
STAGES = (TOKENISE, TEXT_ENCODERS, NOISE, TRANSFORMER, VAE, SAMPLER)
"""The stages of generating images, in order."""
WARM_UP = "warm_up"
"""Compilation for a new shape; left out of the total, since later calls do not repeat it."""
OTHER = "other"
TOTAL = "total"

Mark = TypeVar("Mark")


class StageClock(Generic[Mark]):
    """Milliseconds by stage of what runs inside `running`. A stage inside another one is not counted in the outer one.

    Args:
        mark: reads the clock. A device with a queue of its own records an event in it instead, and does not wait.
        milliseconds: the time between two marks, asked for after the work.
    """

    def __init__(self, mark: Callable[[], Mark], milliseconds: Callable[[Mark, Mark], float]) -> None:
        self._mark = mark
        self._milliseconds = milliseconds
        self._marks: list[tuple[str, Mark]] = []
        self._open: list[str] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Collects the stages of the body."""
        token = _active.set(self)
        self._enter(OTHER)
        try:
            yield
        finally:
            self._leave()
            _active.reset(token)

    def spent(self) -> dict[str, float]:
        """Milliseconds by stage, `other` for time outside all stages, and their sum as `total`, without `warm_up`."""
        spent: dict[str, float] = {}
        for (stage, begin), (_, end) in pairwise(self._marks):
            if stage:
                spent[stage] = spent.get(stage, 0.0) + self._milliseconds(begin, end)
        known = [stage for stage in (*STAGES, OTHER) if stage in spent]
        ordered = {stage: spent[stage] for stage in [*known, *(spent.keys() - set(known))]}
        return {**ordered, TOTAL: sum(value for stage, value in ordered.items() if stage != WARM_UP)}

    def _enter(self, stage: str) -> None:
        self._open.append(stage)
        self._marks.append((stage, self._mark()))

    def _leave(self) -> None:
        self._open.pop()
        self._marks.append((self._open[-1] if self._open else "", self._mark()))


_active: ContextVar[StageClock[Any] | None] = ContextVar("fmg_stage_clock", default=None)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Counts the body as the stage `name` of the clock that runs, if one does."""
    clock = _active.get()
    if clock is None:
        yield
        return
    clock._enter(name)
    try:
        yield
    finally:
        clock._leave()


def wall_clock() -> StageClock[float]:
    """A clock for work that is done when the call returns."""
    return StageClock(time.perf_counter, lambda begin, end: (end - begin) * 1e3)
