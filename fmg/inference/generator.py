"""Few-step sampling with keyed noise: one prompt and seed give the same image, however batches are split.

Imports no torch: the backend computes.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from numbers import Integral
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmg.core.display import counted, html_picture, html_text
from fmg.core.errors import FmgWarning, NotFiniteError, UsageError, WrongTypeError, python_call, whole_number
from fmg.core.events import StageProgress
from fmg.core.profiling import NOISE, stage
from fmg.core.prompt import CutsPrompts
from fmg.core.protocols import Backend, Drawn
from fmg.flow.grids import make_grid
from fmg.rl.keyed_noise import NoiseKey, normal

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# Noise of generated images must differ from the noise of every training iteration, which counts from 0.
GENERATION_ITERATION = -1
DEFAULT_BATCH = 64
# Images that a notebook shows, and their width there in CSS pixels
_SHOWN = 32
_SHOWN_WIDTH = 192


@dataclass(frozen=True, repr=False)
class Generated:
    """Images, their prompts and seeds, and milliseconds spent in each stage (`fmg.core.profiling`).

    Attributes:
        image_array: images (n, 3, h, w) in [0, 1], fp32.
        latent_array: their latents (n, *shape), fp32.
        timings_ms: times by stage, with `total`.
        prompts: prompt of each image.
        seeds: seed of each image.
    """

    image_array: NDArray[np.float32]
    latent_array: NDArray[np.float32]
    timings_ms: Mapping[str, float]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.image_array)

    def __repr__(self) -> str:
        _, _, height, width = self.image_array.shape
        return f"Generated({counted(len(self), 'image')} of {width} x {height} pixels)"

    def _repr_html_(self) -> str:
        shown = [
            html_picture(_png(image), f"{prompt} (seed {seed})", max(_SHOWN_WIDTH, min(image.width, 2 * _SHOWN_WIDTH)))
            for image, prompt, seed in zip(self.to_pil()[:_SHOWN], self.prompts, self.seeds, strict=False)
        ]
        more = f", the first {_SHOWN} shown" if len(self) > _SHOWN else ""
        return html_text(f"{self!r}{more}") + "".join(shown)

    def check_finite(self) -> Generated:
        """These images themselves.

        Raises:
            NotFiniteError: an image has NaN or infinite values.
        """
        bad = np.flatnonzero(~np.isfinite(self.image_array).all(axis=(1, 2, 3)))
        if len(bad):
            first = int(bad[0])
            which = f"The image of '{self.prompts[first]:.60}' with seed {self.seeds[first]}"
            others = f", as do {len(bad) - 1} more of {len(self)} images" if len(bad) > 1 else ""
            raise NotFiniteError(
                f"{which} has values that are not finite{others}",
                "The likely cause is the precision: use bf16 or fp32, whose range is larger than that of fp16."
                " Otherwise the weights are damaged.",
            )
        return self

    def to_pil(self) -> list[Image]:
        """The images as 8-bit RGB images of Pillow. Errors as `check_finite`."""
        from fmg.data.pictures import to_pil

        self.check_finite()
        return [to_pil(image) for image in self.image_array]

    @python_call
    def save(self, path: str | PathLike[str]) -> list[Path]:
        """Writes one image to a file, or any number as `NNNN-<prompt>.png` to a folder. Overwrites nothing.

        Args:
            path: a file name that ends in `.png`, `.jpg` or `.webp`; any other name is a folder, which is created.

        Returns:
            The files written.

        Raises:
            UsageError: the file exists, or several images would go into one file.
            StorageError: the system refused.
        """
        from fmg.data.pictures import PICTURE_FORMATS, save_picture, save_pictures

        target = Path(path)
        if target.suffix.lower() not in PICTURE_FORMATS:
            return save_pictures(list(zip(self.to_pil(), self.prompts, strict=True)), target)
        if len(self) != 1:
            raise UsageError(
                f"{counted(len(self), 'image')} cannot go into the one file '{target}'",
                "Give the name of a folder, or save the images of to_pil() one by one.",
            )
        return [save_picture(self.to_pil()[0], target)]

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
    """Generates images with a backend. A context manager: leaving it frees the runtime.

    Args:
        backend: the runtime.
        grid: default time grid, by name or as a list of times.
        steps: default number of sampling steps (NFE) per image.
        batch_size: images per forward pass; affects images only by rounding.
        tells: whether to warn about prompts that the model truncates. Training, evaluation and verification check all
            of their prompts once, at the start.
    """

    def __init__(
        self,
        backend: Backend,
        grid: str | Sequence[float],
        steps: int,
        batch_size: int = DEFAULT_BATCH,
        *,
        tells: bool = True,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"The batch size is {batch_size}", "Give a batch size of at least 1.")
        self.backend = backend
        self.grid = grid
        self.steps = steps
        self.batch_size = batch_size
        self._tells = tells

    def __repr__(self) -> str:
        return f"Generator({self.backend.name} on {self.backend.device}, {counted(self.steps, 'step')})"

    @python_call
    def times(self, steps: int | None = None, grid: str | Sequence[float] | None = None) -> tuple[float, ...]:
        """The time grid that `generate` uses for these arguments."""
        if grid is None and steps is not None and not isinstance(self.grid, str) and steps != len(self.grid) - 1:
            raise UsageError(
                f"The recipe's explicit grid has {len(self.grid) - 1} steps, but {steps} were requested",
                "Name a grid with --grid, such as uniform.",
            )
        count = self.steps if steps is None else steps
        _, height, width = self.backend.latent_shape
        # latents are packed two by two, as in FLUX
        tokens = (height // 2) * (width // 2)
        return make_grid(self.grid if grid is None else grid, count, image_tokens=tokens)

    @python_call
    def generate(
        self,
        prompts: str | Sequence[str],
        seeds: int | Iterable[int] = 0,
        *,
        num: int = 1,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        release_text: bool = False,
        progress: bool | Callable[[int, int], None] | None = None,
    ) -> Generated:
        """Generates one image for each (prompt, seed), or `num` for each prompt.

        Args:
            prompts: one prompt, or `n` of them.
            seeds: a list of `n` integers, or the seed of the first image of each prompt: further images of a prompt,
                whether by `num` or because `prompts` repeats it, take the following integers. Each seed keys its own
                noise, so an image does not depend on the others in its batch.
            num: images per prompt, one after the other; only with `seeds` as one integer.
            steps: sampling steps (NFE); None takes the default.
            grid: time grid; None takes the default.
            release_text: encode every prompt first, then free the text encoders before the first image is sampled.
            progress: called with (done, total) after each batch. True shows a progress bar, False none; None shows one
                in a terminal or a notebook if there are several batches.

        Raises:
            WrongTypeError: prompts or seeds have the wrong type.
            UsageError: there is no prompt, or the number of seeds differs from that of prompts.
        """
        texts = _prompts(prompts, num)
        keys = image_seeds(seeds, texts, num)
        if callable(progress):
            return self._generate(texts, keys, steps, grid, release_text, progress)
        from fmg.progress import watching

        with watching(None, progress if len(texts) > self.batch_size else bool(progress)) as tell:

            def told(done: int, total: int) -> None:
                tell(StageProgress("images", done, total))

            return self._generate(texts, keys, steps, grid, release_text, told)

    def _generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None,
        grid: str | Sequence[float] | None,
        release_text: bool,
        progress: Callable[[int, int], None],
    ) -> Generated:
        times = self.times(steps, grid)
        clock = self.backend.clock()
        parts: list[Drawn] = []
        with clock.running():
            if self._tells and isinstance(self.backend, CutsPrompts) and (said := self.backend.cut_prompts(prompts)):
                warnings.warn(said, FmgWarning, stacklevel=2)
            for rows, cond in self._encoded(prompts, release_text):
                parts.append(self.backend.draw(cond, _KeyedSource(seeds[rows], self.backend.latent_shape), times))
                progress(min(rows.stop, len(prompts)), len(prompts))
        return Generated(
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.latents for part in parts]),
            clock.spent(),
            tuple(prompts),
            tuple(seeds),
        )

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.backend.__exit__(kind, error, trace)

    def _encoded(self, prompts: Sequence[str], release_text: bool) -> Iterator[tuple[slice, Any]]:
        """The rows of each batch and the encoding of their prompts."""
        starts = range(0, len(prompts), self.batch_size)
        batches = [slice(start, start + self.batch_size) for start in starts]
        encoded = ((rows, self.backend.encode(prompts[rows])) for rows in batches)
        if not release_text:
            yield from encoded
            return
        ready = list(encoded)
        self.backend.release_text()
        yield from ready


def seeded_noise(seeds: Sequence[int], step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The noise (n, *shape) of generated images with `n` seeds: 0 is the initial one, k + 1 that of interval k."""
    return normal([NoiseKey(seed, GENERATION_ITERATION, 0, 0, step) for seed in seeds], shape)


def _prompts(prompts: object, num: int) -> list[str]:
    """The prompt of each image."""
    listed = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(listed, Sequence) or not all(isinstance(prompt, str) for prompt in listed):
        raise WrongTypeError("prompts", prompts, "a string, or a list of strings")
    if not listed:
        raise UsageError("There is no prompt", "Give at least one prompt.")
    if whole_number("num", num) < 1:
        raise UsageError(f"The number of images is {num}", "Set --num to at least 1.")
    return [prompt for prompt in listed for _ in range(num)]


def image_seeds(seeds: object, prompts: Sequence[str], num: int = 1) -> list[int]:
    """The seed of each image: as listed, or consecutive from one integer for the images of each prompt.

    Raises:
        WrongTypeError: they are neither an integer nor a list of integers.
        UsageError: their number differs from that of the prompts.
    """
    listed = whole_seeds(seeds)
    if isinstance(listed, int):
        taken: Counter[str] = Counter()
        found = []
        for prompt in prompts:
            found.append(listed + taken[prompt])
            taken[prompt] += 1
        return found
    if num != 1:
        raise UsageError("A list of seeds and --num both state the number of images", "Leave --num out.")
    if len(prompts) != len(listed):
        what = f"{counted(len(prompts), 'prompt')} came with {counted(len(listed), 'seed')}"
        raise UsageError(what, "Give one seed for each prompt.")
    return listed


def whole_seeds(seeds: object) -> int | list[int]:
    """Seeds as Python integers, even if given as NumPy integers.

    Raises:
        WrongTypeError: they are neither an integer nor a list of integers.
    """
    if isinstance(seeds, Integral):
        return int(seeds)
    if not isinstance(seeds, Iterable) or isinstance(seeds, (str, bytes)):
        raise WrongTypeError("seeds", seeds, "an integer, or a list of integers")
    listed = list(seeds)
    if wrong := [seed for seed in listed if not isinstance(seed, Integral)]:
        raise WrongTypeError("seeds", wrong[0], "integers")
    return [int(seed) for seed in listed]


def _png(picture: Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class _KeyedSource:
    """The noise of generated images by step."""

    seeds: Sequence[int]
    shape: tuple[int, int, int]

    def __call__(self, step: int) -> NDArray[np.float32]:
        with stage(NOISE):
            return seeded_noise(self.seeds, step, self.shape)
