"""Images of an evaluation as folders that other evaluators read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fmg.core.display import counted
from fmg.core.errors import UsageError
from fmg.core.files import atomic_folder, check_place
from fmg.core.prompt import Prompt
from fmg.data.pictures import to_pil
from fmg.eval.scoring import Parts

FORMATS = ("geneval",)

_PADDING = 2


class GenEvalDump:
    """The tree that GenEval's `evaluate_images.py` reads (github.com/djghosh13/geneval, README, "Image generation").

    `NNNNN/metadata.jsonl` is the prompt's entry, `NNNNN/samples/NNNN.png` are its images, and `NNNNN/grid.png` shows
    them in a row with two black pixels between and around. Prompts are numbered in the order of their first image.

    Args:
        folder: where to; images are written as they come.
        entries: the prompt of each image that will come.
    """

    def __init__(self, folder: Path, entries: Sequence[Prompt]) -> None:
        self._folder = folder
        self._entries = entries
        self._numbers = {text: number for number, text in enumerate(dict.fromkeys(e.text for e in entries))}
        self._drawn: Counter[str] = Counter()

    def __call__(self, images: Float[Tensor, "b 3 h w"], scores: Parts) -> None:
        """Writes the next images."""
        start = self._drawn.total()
        for image, entry in zip(images, self._entries[start : start + len(images)], strict=True):
            folder = self._folder / f"{self._numbers[entry.text]:05d}"
            samples = folder / "samples"
            if entry.text not in self._drawn:
                samples.mkdir(parents=True)
                (folder / "metadata.jsonl").write_text(json.dumps(_metadata(entry)), encoding="utf-8")
            to_pil(image).save(samples / f"{self._drawn[entry.text]:04d}.png")
            self._drawn[entry.text] += 1

    def finish(self) -> None:
        """Draws the grids."""
        for number in self._numbers.values():
            folder = self._folder / f"{number:05d}"
            _grid(sorted((folder / "samples").iterdir())).save(folder / "grid.png")


@contextmanager
def geneval_dump(folder: Path, entries: Sequence[Prompt]) -> Iterator[GenEvalDump]:
    """A dump whose folder appears when everything is written.

    Raises:
        UsageError: when the folder exists, or prompts have different numbers of images.
    """
    if folder.exists():
        raise UsageError(f"'{folder}' exists already", "Name a folder that does not exist yet; nothing is overwritten.")
    check_place(folder, "--dump")
    counts = Counter(entry.text for entry in entries)
    if len(set(counts.values())) > 1:
        n = len(counts)
        raise UsageError(
            f"{counted(len(entries), 'image')} do not spread evenly over {counted(n, 'prompt')}, as GenEval wants them",
            f"Give --num a multiple of {n}; the benchmark draws 4 a prompt: --num {4 * n}.",
        )
    with atomic_folder(folder) as partial:
        dump = GenEvalDump(partial, entries)
        yield dump
        dump.finish()


def _metadata(entry: Prompt) -> dict[str, object]:
    """The prompt's line of a metadata file, as it was read; of other prompts what is known."""
    if "prompt" in entry.metadata:
        return dict(entry.metadata)
    return {"tag": entry.tag, **entry.metadata, "prompt": entry.text}


def _grid(files: Sequence[Path]) -> Image.Image:
    pictures: list[Image.Image] = []
    for file in files:
        with Image.open(file) as picture:
            pictures.append(picture.convert("RGB"))
    width, height = pictures[0].size
    grid = Image.new("RGB", (len(pictures) * (width + _PADDING) + _PADDING, height + 2 * _PADDING))
    for column, tile in enumerate(pictures):
        grid.paste(tile, (_PADDING + column * (width + _PADDING), _PADDING))
    return grid
