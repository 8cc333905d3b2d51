"""What generates the images of a server: models in this process, or replicas of them elsewhere (`ray_engine`)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from fmg.core.errors import UsageError
from fmg.inference.service.jobs import ImageJob, Painted, generate_jobs
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
