"""The work of a request."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fmg.core.prompt import CutsPrompts
from fmg.inference.service.models import Served


@dataclass(frozen=True)
class ImageJob:
    """The images of one request: a seed for each."""

    model: Served
    prompt: str
    seeds: tuple[int, ...]
    steps: int | None
    size: str | None = None
    submitted: float = field(default_factory=time.perf_counter, compare=False)

    @property
    def kind(self) -> tuple[str, int | None, str | None]:
        """Jobs for the same model, size and number of steps can be sampled together."""
        return self.model.name, self.steps, self.size

    def __len__(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True)
class Painted:
    """The images of a job.

    Attributes:
        images: (n, 3, h, w) in [0, 1], fp32.
        steps: sampling steps (NFE) per image.
        batch: number of images that were sampled together.
        seconds: time in the queue (`queued`) and of the whole batch (`generated`).
        warnings: warnings about the prompt.
        adapter: sha256 of the adapter; None for a model without one, or with one merged into its weights.
    """

    images: NDArray[np.float32]
    steps: int
    batch: int
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    adapter: str | None = None


def generate_jobs(jobs: Sequence[ImageJob]) -> list[Painted]:
    """The images of jobs of one kind, sampled together. Each has its own seed, so they do not depend on each other.

    Raises:
        FmgError: the model cannot be sampled in this way, or gives an image that is not finite.
    """
    started = time.perf_counter()
    model, steps = jobs[0].model, jobs[0].steps
    adapter = model.use()
    prompts = [job.prompt for job in jobs for _ in job.seeds]
    seeds = [seed for job in jobs for seed in job.seeds]
    made = (
        model.sampler(jobs[0].size)
        .generate(prompts, seeds, steps=steps, progress=lambda done, total: None)
        .check_finite()
    )
    spent = time.perf_counter() - started
    painted, start = [], 0
    for job in jobs:
        rows = slice(start, start + len(job))
        start = rows.stop
        seconds = {"queued": started - job.submitted, "generated": spent}
        taken = steps or model.generator.steps
        said = _warnings(model, job.prompt)
        painted.append(Painted(made.image_array[rows], taken, len(seeds), seconds, said, adapter))
    return painted


def _warnings(model: Served, prompt: str) -> tuple[str, ...]:
    backend = model.generator.backend
    said = backend.cut_prompts([prompt]) if isinstance(backend, CutsPrompts) else ""
    return (said,) if said else ()
