"""The real images that a set is compared with: a folder of pictures, or true pictures of a world's prompts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.display import counted
from fmg.core.errors import FmgWarning, UsageError
from fmg.core.protocols import FeatureExtractor, PromptSet
from fmg.eval.set_metrics import LEAST, FeatureSet, Reference
from fmg.rewards.images import read_image

WORLD = "world"
WORLD_DRAWS = 4
"""True pictures for each image that is evaluated."""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
_BATCH = 64
# 64 pictures of 512 x 512; as floats 192 MiB
_BATCH_PIXELS = 1 << 24


@runtime_checkable
class DrawsTruth(Protocol):
    """A prompt set of a world that can draw what its prompts describe."""

    def true_images(self, prompts: Sequence[str], seed: int) -> Float[Tensor, "n 3 h w"]:
        """One true picture of each prompt, in [0, 1]; positions and sizes are random."""


def picture_files(folder: Path) -> list[Path]:
    """The picture files under a folder, by name and path; the grids of a GenEval tree are no pictures of their own.

    Raises:
        UsageError: when it is not a folder, holds no picture, or a link to a picture that is gone.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder '{folder}'", "Name a folder of pictures.")
    found = [file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and not file.is_dir()]
    # what macOS keeps beside a file on other systems, under the name and ending of the file
    beside = [file for file in found if file.name.startswith("._")]
    if beside:
        warnings.warn(
            f"{counted(len(beside), 'file')} in '{folder}' whose names begin with '._' are macOS's own, not pictures",
            FmgWarning,
            stacklevel=2,
        )
    files = sorted(
        file
        for file in found
        if not file.name.startswith("._") and (file.name != "grid.png" or not (file.parent / "samples").is_dir())
    )
    broken = next((file for file in files if not file.is_file()), None)
    if broken is not None:
        what = f"'{broken}' is a link to nothing" if broken.is_symlink() else f"'{broken}' is not a file"
        raise UsageError(what, "Restore what it stands for, or remove it.")
    if not files:
        raise UsageError(f"'{folder}' holds no pictures", f"Known endings: {', '.join(_SUFFIXES)}.")
    return files


def batches(files: Sequence[Path], size: int = _BATCH) -> Iterator[tuple[slice, Float[Tensor, "b 3 h w"]]]:
    """Pictures in order, in batches of neighbours of one size with at most 2^24 pixels in all, with the rows of each.

    Raises:
        UsageError: naming the file that cannot be read (`fmg.rewards.images.read_image`).
    """
    held: list[Tensor] = []
    start = 0
    for index, file in enumerate(files):
        image = read_image(file)
        full = len(held) == size or (len(held) + 1) * image[0].numel() > _BATCH_PIXELS
        if held and (image.shape != held[0].shape or full):
            yield slice(start, index), _joined(held)
            held, start = [], index
        held.append(image)
    if held:
        yield slice(start, len(files)), _joined(held)


def _joined(images: Sequence[Tensor]) -> Float[Tensor, "b 3 h w"]:
    # a picture that fills a batch alone is not copied
    return images[0][None] if len(images) == 1 else torch.stack(list(images))


def check_reference(reference: str, prompt_set: PromptSet) -> list[Path]:
    """The files of a reference, none for a world's.

    Raises:
        UsageError: when there is no such folder, too few pictures, or no world.
    """
    if reference == WORLD:
        if not isinstance(prompt_set, DrawsTruth):
            raise UsageError(
                "The reference 'world' needs prompts of an embedded world", "Name a folder of real pictures instead."
            )
        return []
    return reference_files(reference)


def reference_files(folder: str) -> list[Path]:
    """The files of a reference folder.

    Raises:
        UsageError: when there is no such folder, or too few pictures in it.
    """
    files = picture_files(Path(folder))
    if len(files) < LEAST:
        raise UsageError(
            f"'{folder}' holds {counted(len(files), 'picture')}", f"A reference set needs {LEAST}; thousands are usual."
        )
    return files


def folder_reference(files: Sequence[Path], extractor: FeatureExtractor, device: torch.device) -> Reference:
    """The reference that picture files make under an extractor. Errors as in `batches`."""
    features = FeatureSet(extractor, np.arange(len(files)))
    for _, images in batches(files):
        features.take(images.to(device))
    return Reference.of(features.vectors)


def world_reference(
    prompt_set: DrawsTruth, prompts: Sequence[str], seed: int, extractor: FeatureExtractor, device: torch.device
) -> Reference:
    """The reference that `WORLD_DRAWS` true pictures of each of `prompts` make under an extractor."""
    repeated = [prompt for prompt in prompts for _ in range(WORLD_DRAWS)]
    features = FeatureSet(extractor, np.arange(len(repeated)))
    for batch in torch.split(prompt_set.true_images(repeated, seed), _BATCH):
        features.take(batch.to(device))
    return Reference.of(features.vectors)
