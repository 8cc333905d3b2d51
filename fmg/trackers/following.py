"""The run's side of its trackers: starts a process for each, wakes it up, and reports its problems.

A tracker cannot stop a run, delay it or print into its output. Problems cause one warning per tracker.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fmg.core.errors import FmgWarning
from fmg.core.events import Evaluated, Event, Finished, IterationDone, Notice, Observer, Resumed, StageProgress
from fmg.core.json_io import parse, read_object, write_json
from fmg.recipe.sections import TrackerRef
from fmg.registry import trackers
from fmg.trackers.follower import Job, files_of

PATIENCE = 120.0
"""Seconds without an answer after which the user is warned that a tracker lags behind."""
CLOSE_TIMEOUT = 60.0
"""Seconds that a finished run waits for its trackers."""
INTERRUPTED_TIMEOUT = 10.0
"""The same for an interrupted run, whose scheduler may not wait longer."""

# not `run.json`, by which a run folder is recognised; no tracker can have this name
_IDENTITY = "tracked_run.json"
# set by launchers for the processes of a run, to which a follower does not belong
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Identity:
    """The identity by which trackers recognise a run: an id, and the name of the run folder when it started."""

    id: str
    name: str

    @classmethod
    def of(cls, content: object) -> Identity | None:
        """The identity that was saved as `content`, if it is one."""
        if not isinstance(content, Mapping):
            return None
        id, name = content.get("id"), content.get("name")
        if not isinstance(id, str) or not isinstance(name, str):
            return None
        return cls(id, name) if len(id) == 8 and set(id) <= set("0123456789abcdef") and 0 < len(name) <= 255 else None


def identity_of(run: Path) -> Identity | None:
    """The identity of a run, if trackers follow it."""
    with suppress(OSError, ValueError):
        return Identity.of(read_object(files_of(run) / _IDENTITY))
    return None


@contextmanager
def followed(run: Path, refs: Sequence[TrackerRef], saved: object, observer: Observer) -> Iterator[Observer]:
    """Lets trackers follow the run in the body, which reports to the observer that it receives.

    Args:
        run: the run folder.
        refs: the trackers.
        saved: the identity in the state that the run resumes from, if any.
        observer: receives everything that the body reports, and where to view the trackers.
    """
    if not refs:
        yield observer
        return
    files = files_of(run)
    files.mkdir(exist_ok=True)
    identity = identity_of(run) or Identity.of(saved) or Identity(secrets.token_hex(4), run.resolve().name)
    write_json(files / _IDENTITY, asdict(identity))
    following = Following(run, refs, identity, observer)
    try:
        yield following
    finally:
        following.close()


class Following:
    """An observer of a run that passes its events on and keeps its trackers up to date.

    Args:
        run: the run folder.
        refs: the trackers.
        identity: identity of the run.
        observer: receives the events.
    """

    def __init__(self, run: Path, refs: Sequence[TrackerRef], identity: Identity, observer: Observer) -> None:
        self._observer = observer
        self._run, self._refs, self._identity = run, refs, identity
        self._links: list[_Link] = []
        self._interrupted = True

    def __call__(self, event: Event) -> None:
        """Passes an event on; events that follow new log lines start the trackers or wake them up."""
        self._observer(event)
        if isinstance(event, (Resumed, IterationDone, Evaluated)):
            # not earlier: a resumed run cuts its log first
            if not self._links:
                lines = len(event.lines) if isinstance(event, Resumed) else 0
                jobs = (_job(self._run, ref, self._identity, lines) for ref in self._refs)
                self._links = [_Link(job, self._observer) for job in jobs]
            for link in self._links:
                link.wake()
        elif isinstance(event, Finished):
            self._interrupted = event.interrupted

    def close(self) -> None:
        """Waits until all trackers have delivered everything, within the time limit."""
        for link in self._links:
            link.hang_up()
        limit = INTERRUPTED_TIMEOUT if self._interrupted else CLOSE_TIMEOUT
        deadline = time.monotonic() + limit
        for link in self._links:
            try:
                with suppress(OSError):
                    self._observer(StageProgress("closing the tracker", 0, 0, link.name))
                link.end(deadline, limit)
            except KeyboardInterrupt:
                # the run is over: the user does not want to wait for its trackers
                deadline = time.monotonic()
                link.kill()


class _Link:
    """The connection to one follower."""

    def __init__(self, job: Job, observer: Observer) -> None:
        self.name = job.name
        self._observer = observer
        self._log = files_of(Path(job.run)) / f"{job.name}.log"
        self._woken, self._heard = 0, 0
        self._answered = time.monotonic()
        self._told = False
        self._buffer = b""
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = self._started(job)
        except OSError as error:
            self._warn(f"its process cannot be started: {error.strerror or error}")

    def _started(self, job: Job) -> subprocess.Popen[bytes]:
        variables = {key: value for key, value in os.environ.items() if key not in _LAUNCHERS}
        # the same modules, but no user folder with the name of a package (`wandb`)
        variables["PYTHONPATH"] = os.pathsep.join(str(Path(path).resolve()) for path in sys.path)
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fmg.trackers.follower"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=variables,
                # Ctrl-C is for the run
                start_new_session=True,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        process.stdin.flush()
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        return process

    def wake(self) -> None:
        """Tells the follower that there are new lines, and reads its reports."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._read()
        if self._heard == self._woken:
            self._answered = time.monotonic()
        with suppress(OSError):
            # a pipe that is full already wakes the follower as well
            self._woken += os.write(self._process.stdin.fileno(), b"\n")
        if time.monotonic() - self._answered > PATIENCE:
            self._warn(f"it has not answered for {PATIENCE:.0f} s")

    def hang_up(self) -> None:
        """Tells the follower that there are no more lines."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def end(self, deadline: float, limit: float) -> None:
        """Waits for the follower until `deadline`, then ends it."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._read()
            self._warn(f"it did not finish within {limit:.0f} s")
            self.kill()
            return
        self._read()
        if self._process.returncode != 0:
            self._warn(f"its process ended with code {self._process.returncode}")
        self._release()

    def kill(self) -> None:
        """Ends the follower and every process that its service has started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._release()

    def _release(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        with suppress(BlockingIOError):
            while data := os.read(self._process.stdout.fileno(), 1 << 16):
                self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            with suppress(ValueError):
                self._hear(parse(line))

    def _hear(self, report: object) -> None:
        content: Mapping[str, Any] = report if isinstance(report, Mapping) else {}
        if isinstance(heard := content.get("heard"), int):
            self._heard, self._answered = heard, time.monotonic()
        if isinstance(where := content.get("where"), str):
            self._observer(Notice("info", f"{self.name}: {where}"))
        if isinstance(problem := content.get("problem"), str):
            self._warn(problem)

    def _warn(self, problem: str) -> None:
        if self._told:
            return
        self._told = True
        text = (
            f"The tracker '{self.name}' has a problem: {problem.rstrip('.')}. The run and its metrics.jsonl are not"
            f" affected. Details: {self._log}."
        )
        try:
            warnings.warn(text, FmgWarning, stacklevel=2)
        except FmgWarning:
            # a program that turns warnings into errors must not lose its run over this
            self._observer(Notice("warning", text))


def _job(run: Path, ref: TrackerRef, identity: Identity, lines: int) -> Job:
    row, options = trackers.row(ref.name), ref.config.model_dump(mode="json")
    return Job(
        run=str(run.resolve()),
        id=identity.id,
        title=identity.name,
        process=os.getpid(),
        lines=lines,
        name=ref.name,
        config=row.config,
        factory=row.factory,
        options=options,
    )
