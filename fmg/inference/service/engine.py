"""What generates the images of a server: models in this process, or replicas of them elsewhere (`ray_engine`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fmg.core.errors import UsageError
from fmg.core.prompt import CutsPrompts
from fmg.inference.service.limits import Limits
from fmg.inference.service.models import Served, ServedModels
from fmg.serving.app import RefusedError
from fmg.serving.batching import BatchQueue


@dataclass(frozen=True)
class Asked:
    """The images of one request: a seed for each, on a served model."""

    model: str
    prompt: str
    seeds: tuple[int, ...]
    steps: int | None
    size: str | None


@dataclass(frozen=True)
class Painted:
    """The images of a request.

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


class Engine(Protocol):
    """Generates the images of a server. All methods belong on its event loop."""

    @property
    def queued(self) -> int:
        """Images that wait or are being generated."""

    def names(self) -> list[str]:
        """The names of the served models; the first is the default."""

    def facts(self, name: str) -> Mapping[str, object]:
        """The entry of a model in `/info` and `/v1/models`, as plain JSON values."""

    def problems(self) -> Sequence[str]:
        """What keeps the server from working as it should, for `/info`; empty if all is well."""

    def submit(self, asked: Asked) -> Future[Painted] | asyncio.Future[Painted]:
        """The future result of a request; cancelling it takes the request out of the queue.

        Raises:
            RefusedError: the model cannot generate them.
            BusyError: the queue is full.
        """

    async def add_adapter(self, name: str, run: str, model: str | None) -> str:
        """Adds an adapter, or replaces the one of its name; returns the name of its model.

        Raises:
            FmgError: it cannot be read, or does not fit the model.
            BusyError: the server is stopping.
        """

    def close(self, timeout: float) -> object:
        """Finishes what is queued, for at most `timeout` seconds."""


@dataclass(frozen=True)
class ImageJob:
    """A request in the queue of a `LocalEngine`."""

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


class LocalEngine:
    """Models in this process, sampled on one thread. Implements `Engine`.

    Args:
        models: the models.
        limits: limits of queue and batch.
    """

    def __init__(self, models: ServedModels, limits: Limits) -> None:
        self._models = models
        self._queue: BatchQueue[ImageJob, Painted] = BatchQueue(
            generate_jobs, limits, "fmg-image-batcher", overtaking=True
        )
        self._adding = asyncio.Lock()

    @property
    def queued(self) -> int:
        return self._queue.queued

    def names(self) -> list[str]:
        return self._models.names()

    def facts(self, name: str) -> Mapping[str, object]:
        return self._model(name).facts()

    def problems(self) -> Sequence[str]:
        return ()

    def submit(self, asked: Asked) -> Future[Painted]:
        model = self._model(asked.model)
        size = _fitting_size(model, asked)
        return self._queue.submit(ImageJob(model, asked.prompt, asked.seeds, asked.steps, size))

    async def add_adapter(self, name: str, run: str, model: str | None) -> str:
        # one at a time: reading inspects the layers, and installing adds some
        async with self._adding:
            new = await asyncio.to_thread(self._models.read_adapter, name, [run], model)
            return (await asyncio.wrap_future(self._queue.between(lambda: self._models.install(new)))).name

    def close(self, timeout: float) -> bool:
        return self._queue.close(timeout)

    def _model(self, name: str) -> Served:
        model = self._models.get(name)
        assert model is not None
        return model


def _fitting_size(model: Served, asked: Asked) -> str | None:
    """The size of the images; None for the model's own. Refuses what the model cannot generate before it is queued.

    Raises:
        RefusedError: the size is not the model's, or its time grid has no such number of steps.
    """
    try:
        sampler = model.sampler(asked.size)
    except UsageError as error:
        raise RefusedError(400, error.what, error.fix, key="size") from None
    try:
        sampler.times(asked.steps)
    except UsageError as error:
        raise RefusedError(400, error.what, error.fix, key="steps") from None
    return None if sampler is model.generator else asked.size


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
