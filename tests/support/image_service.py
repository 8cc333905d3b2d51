"""An image server on a thread of the test, over a backend of a few lines."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BytesIO
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fmg.core.errors import UsageError
from fmg.core.profiling import StageClock, wall_clock
from fmg.core.protocols import Drawn, NoiseSource
from fmg.inference.generator import Generator, seeded_noise
from fmg.inference.service.limits import Limits
from fmg.inference.service.models import Served, ServedModels
from fmg.inference.service.server import ImageServer
from fmg.serving.server import Address
from tests.support.reward_service import call


class Patterns:
    """A backend whose image shows its seed and its prompt: the first noise, shifted by a hash of the text.

    Refuses prompts that begin with `bad`, fails at those that begin with `break`, truncates those that begin with
    `long`.
    """

    name = "patterns"
    detail = "numpy"
    device = "cpu"

    def __init__(self, side: int = 8) -> None:
        self.latent_shape = (3, side, side)
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def encode(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts)

    def draw(self, cond: Sequence[str], noise: NoiseSource, times: Sequence[float]) -> Drawn:
        self.gate.wait(30)
        self.batches.append(len(cond))
        if any(prompt.startswith("bad") for prompt in cond):
            raise UsageError("The prompt is bad", "Write a good one.")
        if any(prompt.startswith("break") for prompt in cond):
            raise RuntimeError("out of order")
        latents = noise(0)
        shifts = np.array([_shift(prompt) for prompt in cond], np.float32).reshape(-1, 1, 1, 1)
        images = 1 / (1 + np.exp(-latents - shifts))
        if any(prompt.startswith("nan") for prompt in cond):
            images[:] = np.nan
        return Drawn(images, latents)

    def cut_prompts(self, prompts: Sequence[str]) -> str:
        return "The prompt is long." if prompts[0].startswith("long") else ""

    def uncached(self) -> AbstractContextManager[None]:
        return nullcontext()

    def release_text(self) -> None: ...

    def clock(self) -> StageClock[Any]:
        return wall_clock()

    def reset_peak_memory(self) -> None: ...

    def peak_memory(self) -> int:
        return 0

    def __enter__(self) -> Patterns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def _shift(prompt: str) -> float:
    return hashlib.sha256(prompt.encode()).digest()[0] / 128 - 1


def expected(prompt: str, seed: int, side: int = 8) -> NDArray[np.uint8]:
    """The image (h, w, 3) of `Patterns`."""
    values = 1 / (1 + np.exp(-seeded_noise([seed], 0, (3, side, side))[0] - np.float32(_shift(prompt))))
    return np.rint(values * 255).astype(np.uint8).transpose(1, 2, 0)


def served(backend: Patterns, name: str = "patterns", *, steps: int = 4) -> Served:
    """A backend as a served model."""
    side = backend.latent_shape[1]
    return Served(name, name, Generator(backend, "uniform", steps, 64, tells=False), (side, side))


@contextmanager
def image_service(
    *models: Served,
    token: str | None = None,
    drain: float = 30.0,
    former: Mapping[str, str] = MappingProxyType({}),
    **limits: Any,
) -> Iterator[ImageServer]:
    """A server of the given models that runs until the block ends."""
    address, served_models = Address("127.0.0.1", 0), ServedModels(models)
    server = ImageServer(served_models, address, limits=Limits(**limits), token=token, drain=drain, former=former)
    with running(server):
        yield server


@contextmanager
def running(server: ImageServer) -> Iterator[None]:
    """Serves on a thread until the block ends."""
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.stop()
        thread.join(30)


def post(
    url: str, body: object, headers: Mapping[str, str] | None = None, path: str = "/v1/images/generations"
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and parsed body of the answer; bytes are sent as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, received, answer = call(url, "POST", path, content, {"Content-Type": "application/json", **(headers or {})})
    return status, received, json.loads(answer)


def pixels(entry: Mapping[str, Any]) -> NDArray[np.uint8]:
    """The image (h, w, 3) of one entry of an answer."""
    return np.asarray(Image.open(BytesIO(base64.b64decode(entry["b64_json"]))).convert("RGB"))
