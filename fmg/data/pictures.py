"""8-bit images from arrays, sample grids with their prompts, and how they are saved. Imports no torch."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fmg.core.errors import UsageError, writing
from fmg.core.files import write_atomic
from fmg.core.pixels import to_uint8

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_BACKGROUND = (255, 255, 255)
_INK = (32, 32, 32)
_FRAME = (208, 208, 208)
_MIN_TILE = 96
_MAX_TILE = 256
_LABEL_WIDTH = 150
_GAP = 4
_SLUG_LENGTH = 40

PICTURE_FORMATS: Mapping[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Suffixes of image files, and Pillow's names of their formats."""
_HEADER = 26


@dataclass(frozen=True)
class GridRow:
    """One prompt and its images (k, 3, h, w) in [0, 1]."""

    prompt: str
    images: Float[Tensor, "k 3 h w"] | NDArray[np.float32]


def to_pil(image: Float[Tensor, "3 h w"] | NDArray[np.float32]) -> Image.Image:
    """An 8-bit RGB version of a (3, h, w) image; values are clamped to [0, 1] and rounded to the nearest level."""
    values = image if isinstance(image, np.ndarray) else image.detach().float().cpu().numpy()
    return Image.fromarray(to_uint8(values))


def save_pictures(pictures: Sequence[tuple[Image.Image, str]], folder: Path, *, called: str = "") -> list[Path]:
    """Saves images as `NNNN-<text>.png` in `folder`, continuing from the highest number there.

    Files are created exclusively, so two processes that write to one folder cannot overwrite each other.

    Args:
        pictures: each with the text for its file name.
        folder: is created if missing.
        called: what precedes the folder's name in an error, such as the option that named it.

    Raises:
        StorageError: the system refused.
    """
    with writing(folder, called=called):
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(match[0]) for file in folder.iterdir() if (match := re.match(r"\d+", file.name))]
        first = max(taken, default=0) + 1
        return [_save(picture, folder, number, text) for number, (picture, text) in enumerate(pictures, first)]


def sample_grid(rows: Sequence[GridRow], title: str) -> Image.Image:
    """One row per prompt: the prompt on the left, its images side by side."""
    tiles = max(len(row.images) for row in rows)
    side = _tile_side(rows[0].images.shape[-1])
    width = _LABEL_WIDTH + tiles * (side + _GAP) + _GAP
    canvas = Image.new("RGB", (width, _HEADER + len(rows) * (side + _GAP) + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP * 2, 6), title, fill=_INK, font=ImageFont.load_default(14))
    for i, row in enumerate(rows):
        top = _HEADER + i * (side + _GAP)
        _label(draw, row.prompt, (_GAP * 2, top), side)
        for j, image in enumerate(row.images):
            left = _LABEL_WIDTH + j * (side + _GAP)
            canvas.paste(_tile(image, side), (left, top))
            draw.rectangle((left, top, left + side - 1, top + side - 1), outline=_FRAME)
    return canvas


def before_after(left: Image.Image, right: Image.Image, titles: tuple[str, str]) -> Image.Image:
    """Two sample grids of the same prompts and seeds side by side, under new titles."""
    bare = right.crop((_LABEL_WIDTH - _GAP, 0, right.width, right.height))
    canvas = Image.new("RGB", (left.width + 24 + bare.width, max(left.height, bare.height)), _BACKGROUND)
    canvas.paste(left, (0, 0))
    canvas.paste(bare, (left.width + 24, 0))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, canvas.width, _HEADER - 1), fill=_BACKGROUND)
    for at, title in zip((_LABEL_WIDTH, left.width + 24 + _GAP), titles, strict=True):
        draw.text((at, 6), title, fill=_INK, font=ImageFont.load_default(14))
    return canvas


def write_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG atomically.

    Raises:
        StorageError: the system refused; no partial file is left.
    """
    file = BytesIO()
    picture.save(file, "PNG")
    write_atomic(path, file.getvalue())


def _tile_side(width: int) -> int:
    """Small images are enlarged by a whole factor, so that their pixels stay sharp."""
    if width >= _MIN_TILE:
        return min(width, _MAX_TILE)
    return width * -(-_MIN_TILE // width)


def _tile(image: Float[Tensor, "3 h w"], side: int) -> Image.Image:
    picture = to_pil(image)
    method = Image.Resampling.NEAREST if picture.width <= side else Image.Resampling.LANCZOS
    return picture.resize((side, side), method)


def _label(draw: ImageDraw.ImageDraw, text: str, corner: tuple[int, int], height: int) -> None:
    font = ImageFont.load_default(13)
    lines = textwrap.wrap(text, 20)[: max(1, height // 17)]
    top = corner[1] + max(0, (height - 17 * len(lines)) // 2)
    for i, line in enumerate(lines):
        draw.text((corner[0], top + 17 * i), line, fill=_INK, font=font)


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Saves an image as a new file, in the format of its suffix (`PICTURE_FORMATS`).

    Raises:
        UsageError: the file exists.
        StorageError: the system refused.
    """
    with writing(path):
        try:
            _write(picture, path, PICTURE_FORMATS[path.suffix.lower()])
        except FileExistsError:
            raise UsageError(f"'{path}' exists already", "Give another name; nothing is overwritten.") from None
    return path


def _save(picture: Image.Image, folder: Path, number: int, text: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower())[:_SLUG_LENGTH].strip("-") or "image"
    path = folder / f"{number:04d}-{slug}.png"
    try:
        _write(picture, path, "PNG")
    except FileExistsError:
        return _save(picture, folder, number + 1, text)
    return path


def _write(picture: Image.Image, path: Path, form: str) -> None:
    """Writes a new file and removes it if that fails. Raises `FileExistsError`."""
    with path.open("xb") as file:
        try:
            picture.save(file, form)
        except BaseException:
            # incomplete, and ours: the name was free
            path.unlink(missing_ok=True)
            raise
