"""Latency by stage after a warm-up, of one generator or of several in turn. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fmg.core.errors import UsageError
from fmg.core.profiling import OTHER, STAGES, TOTAL
from fmg.inference.generator import Generator


@dataclass(frozen=True)
class StageTime:
    """Milliseconds of one stage over the repeats: median, 90th percentile and least."""

    p50: float
    p90: float
    min: float

    @staticmethod
    def of(milliseconds: Sequence[float]) -> StageTime:
        """The three of a list."""
        p50, p90 = np.percentile(milliseconds, [50, 90])
        return StageTime(float(p50), float(p90), float(min(milliseconds)))


@dataclass(frozen=True)
class Timing:
    """What was measured of one generator.

    Attributes:
        label: what it is called beside others.
        backend: its registered name.
        detail: how the backend ran: execution provider, engine, threads, precision.
        device: where.
        images: drawn in each repeat.
        batch: images of one network call.
        steps: network calls an image.
        repeats: measured ones.
        stages: by name (`fmg.core.profiling`), `total` included. A stage that took no time is left out.
        images_per_second: at the median total.
        peak_memory: bytes: of the device, or of the whole process on a CPU.
        totals_ms: of every repeat, in order, so that repeats of several generators can be paired.
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
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """How many times faster `label` is than `reference`: median of the repeats' ratios, and their 10th and 90th
    percentile.

    Attributes:
        label: what is compared.
        reference: what it is compared with.
        p50: median.
        p10: 10th percentile.
        p90: 90th percentile.
        steps: those of an image of `label`.
        reference_steps: those of an image of `reference`.
    """

    label: str
    reference: str
    p50: float
    p10: float
    p90: float
    steps: int
    reference_steps: int


@dataclass(frozen=True)
class Workload:
    """What is drawn in each repeat."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int | None = None
    grid: str | None = None

    @staticmethod
    def of(prompts: Sequence[str], images: int, *, steps: int | None = None, grid: str | None = None) -> Workload:
        """`images` images that go round the prompts."""
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
    """Draws the same images with each generator in turn, `repeats` times after `warmup` times.

    The generators take turns within every repeat, so that whatever else the machine does meets all of them.

    Args:
        generators: by label.
        work: what is drawn.
        repeats: how often it is measured.
        warmup: how often it is drawn before: weights are loaded, memory is allocated, kernels are chosen.
        encode: encode every prompt in every repeat, rather than remember the embeddings of the warm-up.
        progress: called with (done, total) drawings.

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
                drawn = generator.generate(work.prompts, work.seeds, steps=work.steps, grid=work.grid, progress=False)
            if turn >= warmup:
                spent[label].append(drawn.timings_ms)
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
    times = generator.times(work.steps, work.grid)
    found = {stage for repeat in spent for stage in repeat}
    names = [stage for stage in (*STAGES, OTHER, TOTAL) if stage in found]
    stages = {name: StageTime.of([repeat.get(name, 0.0) for repeat in spent]) for name in names}
    backend, images = generator.backend, len(work.prompts)
    return Timing(
        label=label,
        backend=backend.name,
        detail=backend.detail,
        device=backend.device,
        images=images,
        batch=min(generator.batch_size, images),
        steps=len(times) - 1,
        repeats=len(spent),
        stages=stages,
        images_per_second=1e3 * images / stages[TOTAL].p50,
        peak_memory=peak,
        totals_ms=tuple(repeat[TOTAL] for repeat in spent),
    )
