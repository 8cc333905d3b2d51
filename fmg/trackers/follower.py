"""The process of one tracker: it reads `metrics.jsonl` as the run writes it, and passes the lines to the tracker.

A service may print, wait for a server, change its process or crash. None of that affects the run here. The run writes a
byte whenever there are new lines. When it closes the pipe, or dies, the tracker gets the rest and is closed. Reports
are sent back as lines of JSON: `{"where": ...}`, `{"problem": ...}`, `{"heard": bytes}`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

from filelock import FileLock, Timeout

from fmg.core import metric_keys as keys
from fmg.core.errors import reason
from fmg.core.json_io import Line, parse_object, read_object, write_json
from fmg.core.protocols import TrackedRun, Tracker
from fmg.core.signals import CAUGHT
from fmg.data.run_folder import RunFolder
from fmg.data.run_metrics import as_numbers, is_evaluation, metrics_entry
from fmg.registry.config import TrackerConfig
from fmg.registry.registry import load

RETRY_AFTER = 60.0
"""Seconds to wait after a failure before a tracker is tried again."""
_SAVE_EVERY = 100
_LOCK_TIMEOUT = 30.0


@dataclass(frozen=True)
class Job:
    """The job that a follower is started with.

    Attributes:
        run: the run folder.
        id, title: as `TrackedRun.id` and `TrackedRun.name`.
        process: the process that trains.
        lines: number of lines of `metrics.jsonl` from which the run resumes.
        name: name of the tracker.
        config, factory: `module:attribute` paths.
        options: options of the tracker.
    """

    run: str
    id: str
    title: str
    process: int
    lines: int
    name: str
    config: str
    factory: str
    options: Mapping[str, Any]


def files_of(run: Path) -> Path:
    """Where trackers keep their files in a run folder."""
    return run / "trackers"


@dataclass
class MetricsTail:
    """The lines of a growing `metrics.jsonl`, each read once."""

    path: Path
    index: int = 0
    _offset: int = 0

    def new(self) -> Iterator[tuple[int, dict[str, float]]]:
        """The complete lines that were not read before, with their indices.

        A line counts as read once the caller asks for the next one, so one that fails is read again.
        """
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for data in file:
                if not data.endswith(b"\n"):
                    return
                line = Line(self.index + 1, data.rstrip(b"\n"), ended=True)
                yield self.index, as_numbers(self.path, line.number, metrics_entry(self.path, line))
                self.index += 1
                self._offset += len(data)


@dataclass
class Follower:
    """Keeps one tracker up to date with a run."""

    job: Job
    reports: TextIO
    _tracker: Tracker | None = field(default=None, init=False)
    _first: int = field(default=0, init=False)
    _next_try: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._run = RunFolder(Path(self.job.run))
        self._folder = files_of(self._run.path) / self.job.name
        self._record = files_of(self._run.path) / f"{self.job.name}.json"
        self._tail = MetricsTail(self._run.metrics)

    def report(self, **content: object) -> None:
        """Reports to the run, if it still exists."""
        with suppress(OSError):
            self.reports.write(json.dumps(content) + "\n")
            self.reports.flush()

    def catch_up(self, *, last: bool = False) -> None:
        """Gives the tracker all new lines. After a failure it waits for a while, except at the end."""
        if time.monotonic() < self._next_try and not last:
            return
        try:
            if self._tracker is None:
                self._tracker = self._opened()
            for index, line in self._tail.new():
                if index < self._first:
                    continue
                grid = self._run.sample(int(line[keys.ITERATION])) if is_evaluation(line) else None
                self._tracker.log(index, line, grid if grid is not None and grid.is_file() else None)
                if index % _SAVE_EVERY == 0:
                    self._save(index + 1)
            self._save(self._tail.index)
            if last:
                # a run that is killed leaves no other state
                self._tracker.close(self._run.state().state in ("finished", "interrupted"))
        except Exception as error:
            self._next_try = time.monotonic() + RETRY_AFTER
            self._failed(error)

    def _opened(self) -> Tracker:
        job = self.job
        config = cast("type[TrackerConfig]", load(job.config)).model_validate(job.options)
        tracker: Tracker = cast(Any, load(job.factory))(config)
        # the run may have written more of them by now
        resumed = islice(MetricsTail(self._run.metrics).new(), job.lines)
        iterations = [int(line[keys.ITERATION]) for _, line in resumed]
        tracked = TrackedRun(
            self._run.path,
            self._folder,
            job.id,
            job.title,
            job.process,
            self._run.values(),
            iterations,
            self._logged(),
            self._warned,
        )
        self._first, where = tracker.open(tracked)
        self.report(where=where)
        return tracker

    def _logged(self) -> int:
        with suppress(OSError, ValueError):
            logged = read_object(self._record).get("logged")
            return logged if isinstance(logged, int) else 0
        return 0

    def _save(self, logged: int) -> None:
        write_json(self._record, {"logged": max(logged, self._first)})

    def _warned(self, problem: str) -> None:
        self.report(problem=problem)
        # the run prints only the first one, and names the log for the others; the disk may be full
        with suppress(OSError):
            sys.stderr.write(f"{problem}\n")

    def _failed(self, error: Exception) -> None:
        import traceback

        self.report(problem=f"{type(error).__name__}: {reason(error)}")
        # into the tracker's log; the cause may be a full disk
        with suppress(OSError):
            traceback.print_exception(error)


def main() -> None:
    """Follows a run until its process closes standard input."""
    for number in CAUGHT:
        # the run decides when to end, and everything that it logged is still to be delivered
        signal.signal(number, signal.SIG_IGN)
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        job = Job(**cast("dict[str, Any]", parse_object(stdin.readline())))
    # services print to stdout, and may read from stdin
    wakes, reports = os.dup(0), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    follower = Follower(job, reports)
    heard = 0
    # the process of an interrupted run may still be delivering
    lock = FileLock(files_of(Path(job.run)) / f"{job.name}.lock", timeout=_LOCK_TIMEOUT)
    try:
        lock.acquire()
    except Timeout:
        follower.report(problem="a process from an earlier session still follows the run")
        return
    with lock:
        while woken := os.read(wakes, 1 << 16):
            follower.catch_up()
            heard += len(woken)
            follower.report(heard=heard)
        follower.catch_up(last=True)


if __name__ == "__main__":
    main()
    sys.exit()
