"""Runs the builder of one engine as a process: progress as events, bounded memory, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import psutil

from fmg.core.errors import FmgError
from fmg.core.events import Observer, StageProgress
from fmg.export.tensorrt.protocol import Built, Failed, Job, Step, from_line, job_to_json

WORKER = (sys.executable, "-m", "fmg.export.tensorrt.worker")

_GIB = 1 << 30
# Of the memory that is free when the build begins; the rest of the machine has to live as well
_MEMORY_SHARE = 0.9
_WATCH_EVERY = 0.25
_TAIL_BYTES = 2000
_HINTS = ("[V]", "[I]", "[W]")


def run(job: Job, graph: str, observer: Observer, memory_gib: float | None = None) -> Built:
    """Builds one engine.

    Args:
        job: what to build.
        graph: its name, for events and messages.
        observer: hears of every phase of the builder.
        memory_gib: the builder is stopped when it holds more host memory than this; None: nine tenths of what is free.

    Raises:
        FmgError: parser or builder refused, crashed, or took too much memory; the message has their own reason.
        KeyboardInterrupt: Ctrl-C; the builder is stopped first.
    """
    limit = int(_GIB * memory_gib) if memory_gib is not None else int(_MEMORY_SHARE * psutil.virtual_memory().available)
    with tempfile.TemporaryFile() as log, _process(log) as process:
        watch = _MemoryWatch(process.pid, limit)
        outcome: Built | Failed | None = None
        with watch:
            stdin, stdout = process.stdin, process.stdout
            assert stdin is not None
            assert stdout is not None
            try:
                stdin.write(job_to_json(job))
                stdin.close()
            except BrokenPipeError:
                pass  # it ended before it read the job; its exit code and its log say why
            for line in stdout:
                message = from_line(line)
                if isinstance(message, Step):
                    observer(StageProgress(f"{graph}: {message.phase.lower()}", message.done, message.total))
                else:
                    outcome = message
            code = process.wait()
        if isinstance(outcome, Built) and code == 0:
            return outcome
        raise _error(outcome, code, graph, watch, _tail(log))


def _error(outcome: Built | Failed | None, code: int, graph: str, watch: _MemoryWatch, log: str) -> FmgError:
    if watch.exceeded:
        return FmgError(
            f"The engine of {graph} was not built: the builder held more than {watch.limit / _GIB:.3g} GiB of memory",
            "Allow more with --build-memory, build fewer resolutions at once, or use a machine with more memory.",
        )
    if isinstance(outcome, Failed):
        node = f" at the node '{outcome.node}'" if outcome.node and outcome.node not in outcome.reason else ""
        return FmgError(
            f"The engine of {graph} was not built{node}: {outcome.reason}",
            "The ONNX artifact is complete without it; another flavour or precision may have the kernel.",
        )
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return FmgError(
        f"The engine of {graph} was not built: the builder {how}{f' ({log})' if log else ''}",
        "The ONNX artifact is complete without it; report a crash of the builder to NVIDIA with the graph.",
    )


@contextmanager
def _process(log: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """The builder; it is gone when the block is left, however that happens."""
    # a session of its own: Ctrl-C goes to this process alone, which then stops the builder in its own time
    process = subprocess.Popen(
        WORKER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        encoding="utf-8",
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None and not stream.closed:
                stream.close()


class _MemoryWatch:
    """Looks at the memory of a process now and then and ends it when it is more than the limit."""

    def __init__(self, pid: int, limit: int) -> None:
        self.limit = limit
        self.exceeded = False
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            process = psutil.Process(self._pid)
            while not self._stop.wait(_WATCH_EVERY):
                if process.memory_info().rss > self.limit:
                    self.exceeded = True
                    process.kill()
                    return
        except psutil.NoSuchProcess:
            return


def _tail(log: IO[bytes]) -> str:
    """The last line that the builder wrote to stderr, without Polygraphy's own hints and warnings."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - _TAIL_BYTES))
    lines = [" ".join(line.split()) for line in log.read().decode(errors="replace").splitlines()]
    told = [line for line in lines if line and not line.startswith(_HINTS)]
    return told[-1] if told else ""
