"""The real images that a set is compared with: a folder of pictures, or true pictures of a world's prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.core.protocols import FeatureExtractor, PromptSet
from fmg.eval.set_metrics import LEAST, FeatureSet, Reference
from fmg.rewards.images import read_image

WORLD = "world"
WORLD_DRAWS = 4
"""True pictures for each image that is evaluated."""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
_BATCH = 64


@runtime_checkable
class DrawsTruth(Protocol):
    """A prompt set of a world that can draw what its prompts describe."""

    def true_images(self, prompts: Sequence[str], seed: int) -> Float[Tensor, "n 3 h w"]:
        """One true picture of each prompt, in [0, 1]; positions and sizes are random."""


def picture_files(folder: Path) -> list[Path]:
    """The picture files under a folder, by name and path; the grids of a GenEval tree are no pictures of their own.

    Raises:
        UsageError: when it is not a folder, or holds no picture.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder '{folder}'", "Name a folder of pictures.")
    found = (file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
    files = sorted(file for file in found if file.name != "grid.png" or not (file.parent / "samples").is_dir())
    if not files:
        raise UsageError(f"'{folder}' holds no pictures", f"Known endings: {', '.join(_SUFFIXES)}.")
    return files


def batches(files: Sequence[Path], size: int = _BATCH) -> Iterator[tuple[slice, Float[Tensor, "b 3 h w"]]]:
    """Pictures in order, in batches of neighbours that have the same size, with the rows of each.

    Raises:
        UsageError: naming the file that cannot be read (`fmg.rewards.images.read_image`).
    """
    held: list[Tensor] = []
    start = 0
    for index, file in enumerate(files):
        image = read_image(file)
        if held and (image.shape != held[0].shape or len(held) == size):
            yield slice(start, index), torch.stack(held)
            held, start = [], index
        held.append(image)
    if held:
        yield slice(start, len(files)), torch.stack(held)


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
            f"'{folder}' holds {len(files)} picture(s)", f"A reference set needs {LEAST}; thousands are usual."
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
