"""Few-step sampling with keyed noise: the same prompt and seed draw the same picture, whatever the batch split.

Imports no torch: the backend decides what computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmg.core.backends import Backend, Drawn
from fmg.core.errors import UsageError
from fmg.core.stages import NOISE, stage
from fmg.flow.grids import make_grid
from fmg.rl.keyed_noise import NoiseKey, normal

if TYPE_CHECKING:
    from torch import Tensor

# Noise of generated images must differ from the noise of every training iteration, which counts from 0.
GENERATION_ITERATION = -1
DEFAULT_BATCH = 64


@dataclass(frozen=True)
class Generated:
    """What was drawn, and milliseconds spent in each stage (`fmg.core.stages`).

    Attributes:
        image_array: images (n, 3, h, w) in [0, 1], fp32.
        latent_array: their latents (n, *shape), fp32.
        timings_ms: by stage, with `total`.
    """

    image_array: NDArray[np.float32]
    latent_array: NDArray[np.float32]
    timings_ms: Mapping[str, float]

    @property
    def images(self) -> Tensor:
        """The images as a torch tensor on the CPU."""
        import torch

        return torch.from_numpy(self.image_array)

    @property
    def latents(self) -> Tensor:
        """The latents as a torch tensor on the CPU."""
        import torch

        return torch.from_numpy(self.latent_array)


class Generator:
    """Draws images with a backend. A context manager: leaving it frees the runtime.

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

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        release_text: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generated:
        """One image for each (prompt, seed).

        Args:
            prompts: `n` prompts.
            seeds: `n` integers; each seed keys its own noise, so an image does not depend on its neighbours.
            steps: network calls; None takes the default.
            grid: time grid; None takes the default.
            release_text: encode every prompt first, then free the text encoders before the first image is drawn.
            progress: called with (done, total) after each batch.

        Raises:
            UsageError: when there is no prompt, or not one seed for each prompt.
        """
        if not prompts:
            raise UsageError("There is no prompt to draw", "Give at least one prompt.")
        if len(prompts) != len(seeds):
            raise UsageError(f"{len(prompts)} prompts came with {len(seeds)} seeds", "Give one seed for each prompt.")
        times = self.times(steps, grid)
        clock = self.backend.clock()
        parts: list[Drawn] = []
        with clock.running():
            for rows, cond in self._encoded(prompts, release_text):
                parts.append(self.backend.draw(cond, _KeyedSource(seeds[rows], self.backend.latent_shape), times))
                if progress is not None:
                    progress(min(rows.stop, len(prompts)), len(prompts))
        return Generated(
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.latents for part in parts]),
            clock.spent(),
        )

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.backend.__exit__(kind, error, trace)

    def _encoded(self, prompts: Sequence[str], release_text: bool) -> Iterator[tuple[slice, Any]]:
        """The rows of each batch and what their prompts are encoded to."""
        starts = range(0, len(prompts), self.batch_size)
        batches = [slice(start, start + self.batch_size) for start in starts]
        encoded = ((rows, self.backend.encode(prompts[rows])) for rows in batches)
        if not release_text:
            yield from encoded
            return
        ready = list(encoded)
        self.backend.release_text()
        yield from ready

    def _image_tokens(self) -> int:
        """Transformer tokens of one image: latents are packed two by two, as in FLUX."""
        _, height, width = self.backend.latent_shape
        return (height // 2) * (width // 2)


def seeded_noise(seeds: Sequence[int], step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The noise (n, *shape) of generated images with `n` seeds: 0 is the initial one, k + 1 that of interval k."""
    return normal([NoiseKey(seed, GENERATION_ITERATION, 0, 0, step) for seed in seeds], shape)


@dataclass(frozen=True)
class _KeyedSource:
    """The noise of generated images by step."""

    seeds: Sequence[int]
    shape: tuple[int, int, int]

    def __call__(self, step: int) -> NDArray[np.float32]:
        with stage(NOISE):
            return seeded_noise(self.seeds, step, self.shape)
