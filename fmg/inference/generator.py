"""Few-step sampling with keyed noise: the same prompt and seed draw the same picture, whatever the batch split."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.flow.grids import make_grid
from fmg.flow.sampling import native_sample
from fmg.inference.backend import Backend
from fmg.rl.noise import NoiseKey, noise

# Noise of generated images must differ from the noise of every training iteration, which counts from 0.
GENERATION_ITERATION = -1
DEFAULT_BATCH = 64


@dataclass(frozen=True)
class Generated:
    """Images in [0, 1] (n, 3, h, w) on the CPU, their latents, and milliseconds spent in each stage."""

    images: Float[Tensor, "n 3 h w"]
    latents: Float[Tensor, "n *shape"]
    timings_ms: Mapping[str, float]


class Generator:
    """Draws images with a backend.

    Args:
        backend: the runtime.
        grid: default time grid, by name or as a list of times.
        steps: default number of network calls an image.
        batch_size: images a network call; the pictures do not depend on it beyond rounding.
    """

    def __init__(
        self, backend: Backend, grid: str | Sequence[float], steps: int, batch_size: int = DEFAULT_BATCH
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"The batch size is {batch_size}", "Give a batch size of at least 1.")
        self.backend = backend
        self.grid = grid
        self.steps = steps
        self.batch_size = batch_size

    def times(self, steps: int | None = None, grid: str | Sequence[float] | None = None) -> tuple[float, ...]:
        """The grid that `generate` uses for these arguments."""
        if grid is None and steps is not None and not isinstance(self.grid, str) and steps != len(self.grid) - 1:
            raise UsageError(
                f"The recipe's explicit grid has {len(self.grid) - 1} steps and {steps} were asked for",
                "Name a grid with --grid, such as uniform.",
            )
        count = self.steps if steps is None else steps
        return make_grid(self.grid if grid is None else grid, count, image_tokens=self._image_tokens())

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generated:
        """One image for each (prompt, seed).

        Args:
            prompts: `n` prompts.
            seeds: `n` integers; each seed keys its own noise, so an image does not depend on its neighbours.
            steps: network calls; None takes the default.
            grid: time grid; None takes the default.
            progress: called with (done, total) after each batch.

        Raises:
            UsageError: when there is no prompt, or not one seed for each prompt.
        """
        if not prompts:
            raise UsageError("There is no prompt to draw", "Give at least one prompt.")
        if len(prompts) != len(seeds):
            raise UsageError(f"{len(prompts)} prompts came with {len(seeds)} seeds", "Give one seed for each prompt.")
        times = self.times(steps, grid)
        clock = _Clock(self.backend.synchronize)
        images, latents = [], []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            chosen = seeds[rows]
            with clock.stage("text"):
                cond = self.backend.encode(prompts[rows])
            with clock.stage("noise"):
                x_1 = self._noise(chosen, step=0)
            with clock.stage("transformer"):
                x_0 = native_sample(self.backend.flow_map, cond, x_1, times, partial(self._renoise, chosen))
            with clock.stage("decode"):
                picture = self.backend.decode(x_0)
            images.append(picture.cpu())
            latents.append(x_0.cpu())
            if progress is not None:
                progress(min(start + self.batch_size, len(prompts)), len(prompts))
        return Generated(torch.cat(images), torch.cat(latents), clock.total())

    def _noise(self, seeds: Sequence[int], step: int) -> Tensor:
        keys = [NoiseKey(seed, GENERATION_ITERATION, 0, 0, step) for seed in seeds]
        return noise(keys, self.backend.latent_shape).to(self.backend.device)

    def _renoise(self, seeds: Sequence[int], interval: int) -> Tensor:
        return self._noise(seeds, step=interval + 1)

    def _image_tokens(self) -> int:
        """Transformer tokens of one image: latents are packed two by two, as in FLUX."""
        _, height, width = self.backend.latent_shape
        return (height // 2) * (width // 2)


class _Clock:
    """Wall time by stage, in milliseconds, with the device drained at each boundary."""

    def __init__(self, drain: Callable[[], None]) -> None:
        self._drain = drain
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._stage = ""
        self._start = 0.0

    def stage(self, name: str) -> _Clock:
        self._stage = name
        return self

    def __enter__(self) -> None:
        self._drain()
        self._start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._drain()
        self._spent[self._stage] += (time.perf_counter() - self._start) * 1e3

    def total(self) -> dict[str, float]:
        return {**self._spent, "total": sum(self._spent.values())}
