"""The process that builds one engine: reads a job from stdin, reports on stdout, and leaves a plan or a reason.

Polygraphy settles on one flavour of TensorRT when it is imported, and a builder that crashes takes its process with it:
hence a process for each engine. Nothing here imports torch.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from fmg.export.tensorrt.protocol import Built, Failed, Job, Message, Step, job_from_json, to_line
from fmg.inference.tensorrt.flavours import RTX

_GIB = 1 << 30
_HARDWARE = {"same-capability": "SAME_COMPUTE_CAPABILITY", "ampere-plus": "AMPERE_PLUS"}
# Seconds between two reports; a builder makes thousands of steps
_REPORT_EVERY = 0.2

_NODE = (r"with name: (\S+) and operator", r"Node name: (\S+)")

Send = Callable[[Message], None]


def main() -> int:
    """Builds the engine of the job on stdin."""
    send = _private_stdout()
    job = job_from_json(sys.stdin.read())
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
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath, Profile
    from polygraphy.exception import PolygraphyException
    from polygraphy.mod.trt_importer import lazy_import_trt

    trt = lazy_import_trt()
    log = _ErrorLog()
    began = time.monotonic()
    try:
        network = NetworkFromOnnxPath(job.onnx, strongly_typed=True)()
    except PolygraphyException as error:
        return log.failure(str(error))
    layers = count_layers(network[1])
    profiles = []
    for profile in job.profiles:
        ranges = Profile()
        for name, shapes in profile.shapes.items():
            ranges.add(name, shapes.minimum, shapes.optimum, shapes.maximum)
        profiles.append(ranges)
    config = CreateConfig(profiles=profiles, progress_monitor=_monitor(trt, send), **config_arguments(trt, job))
    try:
        plan = EngineBytesFromNetwork(network, config=config, save_timing_cache=job.timing_cache)()
    except PolygraphyException as error:
        return log.failure(str(error))
    with Path(job.plan).open("wb") as file:
        # the plan's own memory, written without a second copy of gigabytes
        file.write(memoryview(plan))
    return Built(layers, time.monotonic() - began)


def config_arguments(trt: Any, job: Job) -> dict[str, Any]:
    """Arguments of Polygraphy's `CreateConfig`; a precision is never among them."""
    options = job.options
    arguments: dict[str, Any] = {
        "builder_optimization_level": options["level"],
        # the detailed names of layers and types are what the census of an engine reads
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
    return arguments


def count_layers(network: Any) -> Mapping[str, Mapping[str, int]]:
    """Layers of a network by kind and by the dtype of their first result."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for layer in network:
        if layer.num_outputs:
            counts[layer.type.name][layer.get_output(0).dtype.name] += 1
    return {kind: dict(sorted(dtypes.items())) for kind, dtypes in sorted(counts.items())}


class _ErrorLog(logging.Handler):
    """Keeps what parser and builder call errors; Polygraphy's exceptions themselves only say that there were some."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        from polygraphy.logger import G_LOGGER

        self._lines: list[str] = []
        G_LOGGER.use_python_logging_system = True
        logger = logging.getLogger("Polygraphy")
        logger.propagate = False
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Remembers one line, without Polygraphy's mark of severity."""
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
    """Sends messages to what was stdout; whatever the libraries print there goes to stderr from now on."""
    channel: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lock = threading.Lock()

    def send(message: Message) -> None:
        with lock:
            channel.write(to_line(message))
            channel.flush()

    return send


def _end_with_the_parent() -> None:
    """Ends this process when the one that asked for the engine is gone, however it went."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
