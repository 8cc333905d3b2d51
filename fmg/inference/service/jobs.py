"""Models that are served, and the work of a request on one of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fmg.core.prompt import CutsPrompts
from fmg.inference.generator import Generator


@dataclass(frozen=True)
class Served:
    """A model under the name that clients use.

    Attributes:
        name: unique on the server.
        target: what was named on the command line.
        generator: samples it.
        size: width and height of its images.
    """

    name: str
    target: str
    generator: Generator
    size: tuple[int, int]

    def facts(self) -> dict[str, object]:
        """What `/info` and `/v1/models` say about it, as plain JSON values."""
        backend = self.generator.backend
        return {
            "target": self.target,
            "size": "x".join(map(str, self.size)),
            "steps": self.generator.steps,
            "backend": backend.name,
            "detail": backend.detail,
            "device": backend.device,
        }


@dataclass(frozen=True)
class ImageJob:
    """The images of one request: a seed for each."""

    model: Served
    prompt: str
    seeds: tuple[int, ...]
    steps: int | None
    submitted: float = field(default_factory=time.perf_counter, compare=False)

    @property
    def kind(self) -> tuple[str, int | None]:
        """Images of one model and number of steps can be sampled together."""
        return self.model.name, self.steps

    def __len__(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True)
class Painted:
    """The images of a job.

    Attributes:
        images: (n, 3, h, w) in [0, 1], fp32.
        steps: sampling steps (NFE) of each.
        batch: images that were sampled together.
        seconds: `queued`, and `generated` with the others of the batch.
        warnings: about its prompt.
    """

    images: NDArray[np.float32]
    steps: int
    batch: int
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = ()


def generate_jobs(jobs: Sequence[ImageJob]) -> list[Painted]:
    """The images of jobs of one kind, sampled together. Each has its own seed, so they do not depend on each other.

    Raises:
        FmgError: the model cannot be sampled in this way, or gives an image that is not finite.
    """
    started = time.perf_counter()
    model, steps = jobs[0].model, jobs[0].steps
    prompts = [job.prompt for job in jobs for _ in job.seeds]
    seeds = [seed for job in jobs for seed in job.seeds]
    made = model.generator.generate(prompts, seeds, steps=steps, progress=lambda done, total: None).check_finite()
    spent = time.perf_counter() - started
    painted, start = [], 0
    for job in jobs:
        rows = slice(start, start + len(job))
        start = rows.stop
        seconds = {"queued": started - job.submitted, "generated": spent}
        taken = steps or model.generator.steps
        painted.append(Painted(made.image_array[rows], taken, len(seeds), seconds, _warnings(model, job.prompt)))
    return painted


def _warnings(model: Served, prompt: str) -> tuple[str, ...]:
    backend = model.generator.backend
    said = backend.cut_prompts([prompt]) if isinstance(backend, CutsPrompts) else ""
    return (said,) if said else ()
