"""`fmg bench`: targets on backends, measured in turn, with latency by stage after a warm-up.

A run and its exported artifact are two forms of one model: torch runs the run, the other backends its artifact.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmg.core.errors import UsageError, suggestion
from fmg.core.events import Observer, ignore
from fmg.core.profiling import OTHER, STAGES, TOTAL
from fmg.inference.artifact.backend import ArtifactBackend
from fmg.inference.artifact.layout import EXPORTED, Artifact, is_artifact, open_artifact
from fmg.inference.artifact.manifest import SAMPLER
from fmg.inference.generator import Generator
from fmg.inference.loading import AUTO, find, load, made_from
from fmg.inference.openers import known_backends

if TYPE_CHECKING:
    from fmg.inference.target import Target

_INT8, _LOOP = "int8", "loop"


@dataclass(frozen=True)
class BenchBackend:
    """A backend by name, with the 8-bit transformer or with the exact one, with fused steps or without."""

    name: str
    int8: bool = False
    loop: bool = False

    @property
    def label(self) -> str:
        """As typed."""
        option = _INT8 if self.int8 else _LOOP if self.loop else ""
        return f"{self.name}:{option}" if option else self.name


@dataclass(frozen=True)
class BenchCase:
    """One thing to measure.

    Attributes:
        label: its name in the results.
        subject: what images are generated from.
        backend: what runs it.
        adapter: whether the adapter of a run is applied.
    """

    label: str
    subject: Target | Artifact
    backend: BenchBackend
    adapter: bool = True


@dataclass(frozen=True)
class BenchOptions:
    """How every case is opened; without a batch size, with the default batches."""

    batch_size: int | None = None
    device: str = AUTO
    dtype: str | None = None
    threads: int | None = None


def parse_backends(text: str) -> tuple[BenchBackend, ...]:
    """Backends from a list such as `torch,onnxruntime,onnxruntime:int8`; `:loop` runs a fused sampler step by step.

    Raises:
        UsageError: one is unknown, or is named twice.
    """
    found, backends = [], known_backends()
    for part in text.split(","):
        name, _, option = part.strip().partition(":")
        if name not in backends.names():
            raise UsageError(f"--compare: there is no backend '{name}'", suggestion(name, backends.names()))
        if option not in ("", _INT8, _LOOP):
            raise UsageError(
                f"--compare: '{option}' is not an option of a backend",
                f"Write {name}, {name}:{_INT8} or {name}:{_LOOP}.",
            )
        if option and backends.build(name).opens != "artifact":
            raise UsageError(
                f"--compare: the backend '{name}' does not support {option}", f"Write onnxruntime:{option}."
            )
        found.append(BenchBackend(name, option == _INT8, option == _LOOP))
    if len(set(found)) < len(found):
        raise UsageError(f"--compare {text} names a backend twice", "Give each backend once.")
    return tuple(found)


def bench_cases(targets: Sequence[str], wanted: Sequence[BenchBackend], observer: Observer = ignore) -> list[BenchCase]:
    """Every target on every backend; no target is the newest run, no backend the preferred one of each target.

    Raises:
        UsageError: a target is unknown or named twice, or has no form that a backend runs.
        MissingDependencyError: a backend is not installed.
    """
    if len(set(targets)) < len(targets):
        raise UsageError("A target is named twice", "Give each target once.")
    cases = []
    for target in targets or (None,):
        subject = find(target, observer=observer)
        name = target
        if name is None:
            name = str(subject.folder) if isinstance(subject, Artifact) else subject.label
        if not wanted:
            cases.append(BenchCase(name, subject, BenchBackend(AUTO)))
        for backend in wanted:
            label = backend.label if len(targets) < 2 else f"{name} {backend.label}"
            cases.append(BenchCase(label, form_for(subject, backend, observer), backend))
    return cases


def form_for(subject: Target | Artifact, backend: BenchBackend, observer: Observer = ignore) -> Target | Artifact:
    """The run or model of an artifact, or the artifact of a run or model, whichever a backend runs."""
    source = known_backends().build(backend.name)
    source.check()
    if source.opens == "artifact":
        artifact = subject if isinstance(subject, Artifact) else _exported_from(subject)
        if backend.loop and SAMPLER not in artifact.manifest.graphs:
            raise UsageError(
                f"The artifact {artifact.folder} has no sampler as one graph, so it always runs the loop",
                f"Export with --fused, or write {backend.name}.",
            )
        return artifact
    return made_from(subject, observer=observer) if isinstance(subject, Artifact) else subject


def _exported_from(target: Target) -> Artifact:
    """The artifact of a run or model at the default location of `fmg export`."""
    run = Path(target.label)
    folder = run / EXPORTED if target.adapter is not None else Path(f"{EXPORTED}s") / run
    if not is_artifact(folder):
        raise UsageError(
            f"'{target.label}' has no artifact in {folder}",
            f"Create it: fmg export {target.label}; or name an artifact.",
        )
    return open_artifact(folder)


def open_cases(cases: Sequence[BenchCase], options: BenchOptions, stack: ExitStack) -> dict[str, Generator]:
    """The generator of each case by its label; `stack` closes them.

    Raises:
        UsageError: a case does not support the options.
    """
    return {case.label: stack.enter_context(_open(case, options)) for case in cases}


def _open(case: BenchCase, options: BenchOptions) -> Generator:
    artifact = isinstance(case.subject, Artifact)
    return load(
        case.subject,
        backend=case.backend.name,
        device=options.device,
        # an artifact has its own precision and its own adapter; only torch can be asked for others
        dtype=None if artifact else options.dtype,
        batch_size=options.batch_size,
        adapter=True if artifact else case.adapter,
        threads=options.threads,
        int8=case.backend.int8,
        fused=not case.backend.loop,
    )


@dataclass(frozen=True)
class StageTime:
    """Milliseconds of one stage over the repeats: median, 90th percentile and minimum."""

    p50: float
    p90: float
    min: float

    @staticmethod
    def of(milliseconds: Sequence[float]) -> StageTime:
        p50, p90 = np.percentile(milliseconds, [50, 90])
        return StageTime(float(p50), float(p90), float(min(milliseconds)))


@dataclass(frozen=True)
class Timing:
    """The measurements of one generator.

    Attributes:
        label: its name in the results.
        backend: its registered name.
        detail: how the backend ran: execution provider, engine, threads, precision.
        device: device that it ran on.
        images: images generated in each repeat.
        batch: images per forward pass.
        steps: sampling steps per image.
        repeats: number of measured repeats.
        stages: statistics by stage (`fmg.core.profiling`), `total` included. A stage that took no time is left out.
        images_per_second: throughput at the median total.
        peak_memory: bytes: of the device, or of the whole process on a CPU.
        totals_ms: total time of every repeat, in order, so that repeats of several generators can be paired.
    """

    label: str
    backend: str
    detail: str
    device: str
    images: int
    batch: int
    steps: int
    repeats: int
    stages: Mapping[str, StageTime]
    images_per_second: float
    peak_memory: int
    totals_ms: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """How many times faster `label` is than `reference`: median of the repeats' ratios, and their 10th and 90th
    percentile; with the sampling steps per image of both."""

    label: str
    reference: str
    p50: float
    p10: float
    p90: float
    steps: int
    reference_steps: int


@dataclass(frozen=True)
class Workload:
    """The images to generate in each repeat."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int | None = None
    grid: str | None = None

    @staticmethod
    def of(prompts: Sequence[str], images: int, *, steps: int | None = None, grid: str | None = None) -> Workload:
        """`images` images that cycle through the prompts."""
        chosen = tuple(prompts[i % len(prompts)] for i in range(images))
        return Workload(chosen, tuple(range(images)), steps, grid)


def measure(
    generators: Mapping[str, Generator],
    work: Workload,
    *,
    repeats: int = 5,
    warmup: int = 1,
    encode: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Generates the same images with each generator in turn, `repeats` times after `warmup` unmeasured times.

    The generators take turns within every repeat, so that any other load on the machine affects all of them.

    Args:
        generators: generators by label.
        work: what is generated.
        repeats: measured runs.
        warmup: runs before them: weights are loaded, memory is allocated, kernels are chosen.
        encode: encode every prompt in every repeat, rather than cache the embeddings of the warm-up.
        progress: called with (done, total) runs.

    Raises:
        UsageError: there is nothing to measure.
    """
    if repeats < 1 or warmup < 0 or not generators:
        raise UsageError("There is nothing to measure", "Give at least one target and one repeat.")
    spent: dict[str, list[Mapping[str, float]]] = {label: [] for label in generators}
    peaks = dict.fromkeys(generators, 0)
    total = (warmup + repeats) * len(generators)
    for turn in range(warmup + repeats):
        for place, (label, generator) in enumerate(generators.items()):
            backend = generator.backend
            backend.reset_peak_memory()
            with backend.uncached() if encode else nullcontext():
                images = generator.generate(work.prompts, work.seeds, steps=work.steps, grid=work.grid, progress=False)
            if turn >= warmup:
                spent[label].append(images.timings_ms)
                peaks[label] = max(peaks[label], backend.peak_memory())
            if progress is not None:
                progress(turn * len(generators) + place + 1, total)
    return {label: _timing(label, generators[label], work, spent[label], peaks[label]) for label in generators}


def ratios(timings: Mapping[str, Timing]) -> tuple[Ratio, ...]:
    """How many times faster each generator is than the first, repeat by repeat."""
    first, *others = timings.values()
    out = []
    for other in others:
        quotients = np.array(first.totals_ms) / np.array(other.totals_ms)
        p10, p50, p90 = (float(value) for value in np.percentile(quotients, [10, 50, 90]))
        out.append(Ratio(other.label, first.label, p50, p10, p90, other.steps, first.steps))
    return tuple(out)


def _timing(
    label: str, generator: Generator, work: Workload, spent: Sequence[Mapping[str, float]], peak: int
) -> Timing:
    found = {stage for repeat in spent for stage in repeat}
    names = [stage for stage in (*STAGES, OTHER, TOTAL) if stage in found]
    stages = {name: StageTime.of([repeat.get(name, 0.0) for repeat in spent]) for name in names}
    backend, images = generator.backend, len(work.prompts)
    steps = len(generator.times(work.steps, work.grid)) - 1
    return Timing(
        label=label,
        backend=backend.name,
        detail=backend.detail_of(steps) if isinstance(backend, ArtifactBackend) else backend.detail,
        device=backend.device,
        images=images,
        batch=min(generator.batch_size, images),
        steps=steps,
        repeats=len(spent),
        stages=stages,
        images_per_second=1e3 * images / stages[TOTAL].p50,
        peak_memory=peak,
        totals_ms=tuple(repeat[TOTAL] for repeat in spent),
    )
