"""Folders of images with their prompts: images with a `metadata.jsonl`, and GenEval trees, read and written.

A GenEval tree (github.com/djghosh13/geneval, README, "Image generation") has a folder for each prompt, numbered from
00000: `metadata.jsonl` is the prompt's entry, `samples/NNNN.png` are its images, and `grid.png` shows them in a row.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fmg.core.display import counted
from fmg.core.errors import FmgWarning, UsageError
from fmg.core.files import atomic_folder, check_place, inside
from fmg.core.json_io import read_objects
from fmg.core.prompt import Prompt
from fmg.data.pictures import to_pil
from fmg.eval.scoring import Parts
from fmg.rewards.images import read_image

METADATA = "metadata.jsonl"
DUMP_FORMATS = ("geneval",)
PICTURES_A_BATCH = 64

_NAME_KEYS, _TEXT_KEYS = ("file_name", "path"), ("prompt", "text", "caption")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
# 64 pictures of 512 x 512; as floats 192 MiB
_BATCH_PIXELS = 1 << 24
# black pixels around and between the images of a grid
_PADDING = 2


@dataclass(frozen=True)
class Captioned:
    """An image file and its prompt, None if it has none."""

    file: Path
    prompt: Prompt | None


def picture_files(folder: Path) -> list[Path]:
    """The image files under a folder, sorted; the grids of a GenEval tree are left out.

    Raises:
        UsageError: it is not a folder, contains no image, or has a link to a missing image.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder '{folder}'", "Name a folder of images.")
    found = [file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and not file.is_dir()]
    # macOS keeps attributes of a file beside it on other file systems, under its name and suffix
    beside = [file for file in found if file.name.startswith("._")]
    if beside:
        warnings.warn(
            f"{counted(len(beside), 'file')} in '{folder}' whose names begin with '._' are macOS's, not images",
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
        what = f"'{broken}' is a broken link" if broken.is_symlink() else f"'{broken}' is not a file"
        raise UsageError(what, "Restore the image, or remove the link.")
    if not files:
        raise UsageError(f"'{folder}' contains no images", f"Known suffixes: {', '.join(_SUFFIXES)}.")
    return files


def batches(files: Sequence[Path], size: int = PICTURES_A_BATCH) -> Iterator[tuple[slice, Float[Tensor, "b 3 h w"]]]:
    """Images in order, in batches of neighbours of one size with at most 2^24 pixels in total, with the rows of each.

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
    # a single large picture is not copied
    return images[0][None] if len(images) == 1 else torch.stack(list(images))


def captioned(path: Path, *, everything: bool = False) -> list[Captioned]:
    """The images under a path with their prompts; for a file, those of the `metadata.jsonl` beside it.

    Args:
        path: an image file, a folder, or a GenEval tree.
        everything: whether to take all images of a folder and ignore prompts.

    Raises:
        UsageError: no such path, no images in it, a `metadata.jsonl` that does not match them, or one with prompts
            for only some of them.
    """
    if not path.exists():
        raise UsageError(f"There is no image or folder '{path}'", "Check the path.")
    if path.is_file():
        beside = [] if everything else [x for x in _listed(path.parent) if x.file.resolve() == path.resolve()]
        return beside or [Captioned(path, None)]
    files = picture_files(path)
    if everything:
        return [Captioned(file, None) for file in files]
    trees = sorted(file.parent for file in path.glob(f"*/{METADATA}") if (file.parent / "samples").is_dir())
    found = [entry for tree in trees for entry in _geneval(tree)] if trees else list(_listed(path))
    if not found:
        return [Captioned(file, None) for file in files]
    missing = next((entry.file for entry in found if not entry.file.is_file()), None)
    if missing is not None:
        raise UsageError(f"'{path / METADATA}' names '{missing}', which does not exist", "Correct the file.")
    named = {entry.file.resolve() for entry in found}
    left = [file for file in files if file.resolve() not in named]
    if left:
        where = "GenEval tree" if trees else METADATA
        raise UsageError(
            f"The {where} in '{path}' has no prompt for '{left[0]}', the first of {len(left)} such images",
            "Add them there, move them elsewhere, or give --prompt for all.",
        )
    return found


def _listed(folder: Path) -> Iterator[Captioned]:
    """One entry per line of a folder's `metadata.jsonl`; none without that file."""
    file = folder / METADATA
    if not file.is_file():
        return
    for name, text in _captions(file):
        yield Captioned(inside(folder, name, named_in=file, links=True), Prompt(text, "", {}))


def _geneval(tree: Path) -> Iterator[Captioned]:
    file = tree / METADATA
    ((_, entry),) = list(read_objects(file))[:1] or [(0, {})]
    text = entry.get("prompt")
    if not isinstance(text, str):
        raise UsageError(f"'{file}' has no prompt", "Write one JSON object with a prompt there, as GenEval does.")
    for picture in picture_files(tree / "samples"):
        yield Captioned(picture, Prompt(text, str(entry.get("tag", "")), entry))


def _captions(file: Path) -> Iterator[tuple[str, str]]:
    for number, entry in read_objects(file):
        name, text = _text_under(entry, _NAME_KEYS), _text_under(entry, _TEXT_KEYS)
        if name is None or text is None:
            raise UsageError(f"{file}:{number}: no file_name and prompt", 'Write {"file_name": "a.png", "prompt": ""}.')
        yield name, text


def _text_under(entry: Mapping[str, object], keys: Sequence[str]) -> str | None:
    return next((value for key in keys if isinstance(value := entry.get(key), str)), None)


class GenEvalDump:
    """Writes the tree for GenEval's `evaluate_images.py`, with prompts numbered in the order of their first image.

    Args:
        folder: where to write images, as they come.
        entries: the prompts of the images to come.
    """

    def __init__(self, folder: Path, entries: Sequence[Prompt]) -> None:
        self._folder = folder
        self._entries = entries
        self._numbers = {text: number for number, text in enumerate(dict.fromkeys(e.text for e in entries))}
        self._saved: Counter[str] = Counter()

    def __call__(self, images: Float[Tensor, "b 3 h w"], scores: Parts) -> None:
        start = self._saved.total()
        for image, entry in zip(images, self._entries[start : start + len(images)], strict=True):
            folder = self._folder / f"{self._numbers[entry.text]:05d}"
            samples = folder / "samples"
            if entry.text not in self._saved:
                samples.mkdir(parents=True)
                (folder / "metadata.jsonl").write_text(json.dumps(_metadata(entry)), encoding="utf-8")
            to_pil(image).save(samples / f"{self._saved[entry.text]:04d}.png")
            self._saved[entry.text] += 1

    def finish(self) -> None:
        for number in self._numbers.values():
            folder = self._folder / f"{number:05d}"
            _grid(sorted((folder / "samples").iterdir())).save(folder / "grid.png")


@contextmanager
def geneval_dump(folder: Path, entries: Sequence[Prompt]) -> Iterator[GenEvalDump]:
    """A dump whose folder appears once everything is written.

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
            f"{counted(len(entries), 'image')} cannot be divided evenly among {counted(n, 'prompt')},"
            " as GenEval requires",
            f"Set --num to a multiple of {n}; the benchmark uses 4 images per prompt: --num {4 * n}.",
        )
    with atomic_folder(folder) as partial:
        dump = GenEvalDump(partial, entries)
        yield dump
        dump.finish()


def _metadata(entry: Prompt) -> dict[str, object]:
    """The prompt's line of GenEval's metadata file, unchanged; for other prompts, what is known."""
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
