"""Builds one engine in a separate process: the process, its caller, and the JSON lines between them.

Polygraphy settles on one flavour of TensorRT when it is imported, and a builder that crashes takes its process with it.
`build_engine` starts this module as that process: progress arrives as events, memory is bounded, and nothing is left
behind. Nothing here imports torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TextIO, cast

import psutil

from fmg.core.errors import FmgError
from fmg.core.events import Observer, StageProgress
from fmg.core.json_io import parse
from fmg.inference.artifact.decode import decode
from fmg.inference.tensorrt.flavours import RTX
from fmg.inference.tensorrt.records import Profile

WORKER = (sys.executable, "-m", "fmg.export.tensorrt.worker")

_GIB = 1 << 30
# Share of the memory that is free when the build begins; the rest of the machine needs some as well
_MEMORY_SHARE = 0.9
_WATCH_EVERY = 0.25
_TAIL_BYTES = 2000
_HINTS = ("[V]", "[I]", "[W]")
_HARDWARE = {"same-capability": "SAME_COMPUTE_CAPABILITY", "ampere-plus": "AMPERE_PLUS"}
# Seconds between two reports; a builder makes thousands of steps
_REPORT_EVERY = 0.2
_NODE = (r"with name: (\S+) and operator", r"Node name: (\S+)")


@dataclass(frozen=True)
class Job:
    """One engine to build.

    Attributes:
        onnx: the graph, its weights beside it.
        plan: where the engine goes; besides it, the builder writes only the timing cache.
        flavour: `tensorrt` or `rtx`.
        profiles: in the order of their index.
        options: `EngineOptions.ingredients()`.
        timing_cache: file of measured kernel times to read and add to, or None.
    """

    onnx: str
    plan: str
    flavour: str
    profiles: tuple[Profile, ...]
    options: Mapping[str, object]
    timing_cache: str | None


@dataclass(frozen=True)
class Step:
    """Progress of one phase of the builder."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class Built:
    """The plan is written. `layers` counts the layers of the parsed network by kind and dtype of their result."""

    layers: Mapping[str, Mapping[str, int]]
    seconds: float


@dataclass(frozen=True)
class Failed:
    """No plan: the reason as the parser or builder gives it, and the node that it names, if any."""

    reason: str
    node: str


Message = Step | Built | Failed
_KINDS: Mapping[str, type[Message]] = {"step": Step, "built": Built, "failed": Failed}
Send = Callable[[Message], None]


def to_line(message: Message) -> str:
    """The JSON line of a message."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(message, cls))
    return json.dumps({"kind": kind, **asdict(message)}) + "\n"


def from_line(line: str) -> Message:
    """The message of a line.

    Raises:
        ValueError: it is not a message.
    """
    content = parse(line)
    if not isinstance(content, dict) or content.get("kind") not in _KINDS:
        raise ValueError(f"{line!r:.80} is not a message from the engine builder")
    return decode(_KINDS[content.pop("kind")], content)


def build_engine(job: Job, graph: str, observer: Observer, memory_gib: float | None = None) -> Built:
    """Builds one engine in a new process.

    Args:
        job: what to build.
        graph: its name, for events and messages.
        observer: receives every phase of the builder.
        memory_gib: the builder is stopped when it uses more host memory than this; None: nine tenths of what is free.

    Raises:
        FmgError: parser or builder refused, crashed, or took too much memory; the message gives their reason.
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
                stdin.write(json.dumps(asdict(job)))
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
            f"The engine of {graph} was not built: the builder used more than {watch.limit / _GIB:.3g} GiB of memory",
            "Allow more with --build-memory, build fewer resolutions at once, or use a machine with more memory.",
        )
    if isinstance(outcome, Failed):
        node = f" at the node '{outcome.node}'" if outcome.node and outcome.node not in outcome.reason else ""
        return FmgError(
            f"The engine of {graph} was not built{node}: {outcome.reason}",
            "Try another flavour or precision; the ONNX artifact is complete without the engine.",
        )
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return FmgError(
        f"The engine of {graph} was not built: the builder {how}{f' ({log})' if log else ''}",
        "Report a builder crash to NVIDIA with the graph; the ONNX artifact is complete without the engine.",
    )


@contextmanager
def _process(log: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """The builder; it has ended when the block is left, however that happens."""
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
    """Checks the memory of a process regularly and ends the process when it is above the limit."""

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


def main() -> int:
    """The process: reads a job from stdin, reports on stdout, and leaves a plan or a reason."""
    send = _private_stdout()
    job = decode(Job, parse(sys.stdin.read()))
    _end_with_the_parent()
    try:
        send(build(job, send))
    except Exception as error:
        send(Failed(f"{type(error).__name__}: {error}", ""))
        return 1
    return 0


def build(job: Job, send: Send) -> Built | Failed:
    """Parses and builds; the plan is written only when it is complete."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if job.flavour == RTX.name else "0"
    from polygraphy.backend import trt as poly
    from polygraphy.exception import PolygraphyException
    from polygraphy.mod.trt_importer import lazy_import_trt

    trt = lazy_import_trt()
    log = _ErrorLog()
    began = time.monotonic()
    try:
        network = poly.NetworkFromOnnxPath(job.onnx, strongly_typed=True)()
    except PolygraphyException as error:
        return log.failure(str(error))
    layers = count_layers(network[1])
    profiles = []
    for profile in job.profiles:
        ranges = poly.Profile()
        for name, shapes in profile.shapes.items():
            ranges.add(name, shapes.minimum, shapes.optimum, shapes.maximum)
        profiles.append(ranges)
    arguments, create = config_arguments(trt, job), poly.CreateConfig
    if "compute_capabilities" in arguments:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        create = CreateConfigRTX
    config = create(profiles=profiles, progress_monitor=_monitor(trt, send), **arguments)
    try:
        plan = poly.EngineBytesFromNetwork(network, config=config, save_timing_cache=job.timing_cache)()
    except PolygraphyException as error:
        return log.failure(str(error))
    with Path(job.plan).open("wb") as file:
        # the plan's own memory, written without a second copy of gigabytes
        file.write(memoryview(plan))
    return Built(layers, time.monotonic() - began)


def config_arguments(trt: Any, job: Job) -> dict[str, Any]:
    """Arguments of Polygraphy's `CreateConfig`; never a precision, which comes from the graph."""
    options = job.options
    arguments: dict[str, Any] = {
        "builder_optimization_level": options["level"],
        # the precision report of an engine reads the detailed names of layers and types
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "version_compatible": options["version_compatible"],
        "weight_streaming": options["weight_streaming"],
        "refittable": options["refittable"],
        "load_timing_cache": job.timing_cache,
    }
    if options["workspace_gib"] is not None:
        size = int(float(str(options["workspace_gib"])) * _GIB)
        arguments["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: size}
    if options["hardware"] != "none":
        level = getattr(trt.HardwareCompatibilityLevel, _HARDWARE[str(options["hardware"])])
        arguments["hardware_compatibility_level"] = level
    if targets := options.get("capabilities"):
        arguments["compute_capabilities"] = [
            tuple(map(int, target.split("."))) for target in cast("list[str]", targets)
        ]
    return arguments


def count_layers(network: Any) -> Mapping[str, Mapping[str, int]]:
    """Layers of a network by kind and by the dtype of their first result."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for layer in network:
        if layer.num_outputs:
            counts[layer.type.name][layer.get_output(0).dtype.name] += 1
    return {kind: dict(sorted(dtypes.items())) for kind, dtypes in sorted(counts.items())}


class _ErrorLog(logging.Handler):
    """Keeps the errors of parser and builder; Polygraphy's exceptions only say that there were errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        from polygraphy.logger import G_LOGGER

        self._lines: list[str] = []
        G_LOGGER.use_python_logging_system = True
        logger = logging.getLogger("Polygraphy")
        logger.propagate = False
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        # without Polygraphy's mark of severity
        self._lines.append(re.sub(r"^\[\w\] ", "", " ".join(record.getMessage().split())))

    def failure(self, summary: str) -> Failed:
        """The first thing that went wrong, and the node that it happened at."""
        nodes = [found[1] for line in self._lines for pattern in _NODE if (found := re.search(pattern, line))]
        told = [line for line in self._lines if not line.startswith("[!]")] or [summary]
        # the parser ends with a summary of node, operator and reason; the builder begins with the cause
        reason = next((line for line in reversed(told) if line.startswith("In node")), told[0])
        return Failed(reason, next(iter(nodes), ""))


def _monitor(trt: Any, send: Send) -> Any:
    """A progress monitor of the builder that sends the steps of its outermost phases."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._totals: dict[str, int] = {}
            self._last = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._totals[phase_name] = num_steps
            self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._totals.pop(phase_name, None)

        def _report(self, phase: str, done: int) -> None:
            now = time.monotonic()
            if now - self._last >= _REPORT_EVERY:
                self._last = now
                send(Step(phase, done, self._totals.get(phase, 0)))

    return Monitor()


def _private_stdout() -> Send:
    """Sends messages to the original stdout; what the libraries print there goes to stderr from now on."""
    channel: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lock = threading.Lock()

    def send(message: Message) -> None:
        with lock:
            channel.write(to_line(message))
            channel.flush()

    return send


def _end_with_the_parent() -> None:
    """Ends this process when the one that asked for the engine is gone, however it ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
