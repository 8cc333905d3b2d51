"""Pictures of a run: sample grids with their prompts, before and after side by side, the curve. Imports no torch."""

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

from fmg.core.errors import CheckpointError, UsageError, writing
from fmg.core.image_files import decoded
from fmg.core.shown import plot_label
from fmg.core.unfinished import write_atomic
from fmg.data.run_folder import RunFolder
from fmg.data.run_metrics import Outcome

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.figure import Figure
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
"""Suffixes of picture files that are written, and what Pillow calls their formats."""
_HEADER = 26


@dataclass(frozen=True)
class GridRow:
    """One prompt and its images (k, 3, h, w) in [0, 1]."""

    prompt: str
    images: Float[Tensor, "k 3 h w"] | NDArray[np.float32]


def to_pil(image: Float[Tensor, "3 h w"] | NDArray[np.float32]) -> Image.Image:
    """An 8-bit RGB picture of a (3, h, w) image; values are clamped to [0, 1] and rounded to the nearest level."""
    values = image if isinstance(image, np.ndarray) else image.detach().float().cpu().numpy()
    levels = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))


def save_pictures(pictures: Sequence[tuple[Image.Image, str]], folder: Path, *, called: str = "") -> list[Path]:
    """Saves pictures as `NNNN-<text>.png` in `folder`, numbered on from the highest number there.

    Files are created exclusively, so two processes that write into one folder cannot overwrite each other.

    Args:
        pictures: each with the text that its name is made of.
        folder: where to; is made.
        called: what leads the folder's name in an error, such as the option that gave it.

    Raises:
        StorageError: the system refused.
    """
    with writing(folder, called=called):
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(match[0]) for file in folder.iterdir() if (match := re.match(r"\d+", file.name))]
        first = max(taken, default=0) + 1
        return [_save(picture, folder, number, text) for number, (picture, text) in enumerate(pictures, first)]


def open_picture(path: Path) -> Image.Image:
    """A picture that a run wrote.

    Raises:
        CheckpointError: the file is not there or damaged.
    """
    try:
        return decoded(path, lambda picture: picture.copy())
    except UsageError as error:
        raise CheckpointError(error.what, "Make it again: fmg report.") from None


def sample_grid(rows: Sequence[GridRow], title: str) -> Image.Image:
    """One row a prompt, its images side by side, the prompt on the left."""
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
    """Two sample grids of the same prompts and seeds side by side, under other titles."""
    bare = right.crop((_LABEL_WIDTH - _GAP, 0, right.width, right.height))
    canvas = Image.new("RGB", (left.width + 24 + bare.width, max(left.height, bare.height)), _BACKGROUND)
    canvas.paste(left, (0, 0))
    canvas.paste(bare, (left.width + 24, 0))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, canvas.width, _HEADER - 1), fill=_BACKGROUND)
    for at, title in zip((_LABEL_WIDTH, left.width + 24 + _GAP), titles, strict=True):
        draw.text((at, 6), title, fill=_INK, font=ImageFont.load_default(14))
    return canvas


def kept_picture(run: RunFolder, outcome: Outcome) -> Image.Image | None:
    """Samples by the base and by the checkpoint that the run keeps; None where one of the two grids is not there."""
    if outcome.iteration is None:
        return None
    kept = run.sample(outcome.iteration, averaged=outcome.averaged and outcome.iteration > 0)
    title = "kept: the base itself" if outcome.iteration == 0 else f"kept: {outcome.title}"
    try:
        left, right = (decoded(path, lambda image: image.convert("RGB")) for path in (run.sample(0), kept))
    except UsageError:
        return None
    return before_after(left, right, ("base", title))


def write_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG in one step.

    Raises:
        StorageError: the system refused; there is no part of a file.
    """
    file = BytesIO()
    picture.save(file, "PNG")
    write_atomic(path, file.getvalue())


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure in one step, in the format that the ending names.

    Raises:
        StorageError: the system refused; there is no part of a file.
    """
    file = BytesIO()
    figure.savefig(file, format=path.suffix.removeprefix(".") or "png")
    write_atomic(path, file.getvalue())


@dataclass(frozen=True)
class Curve:
    """A line of the run's figure: x, y, and the half-width of its band (zeros for none)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[float]


def curve_figure(trained: Sequence[Curve], heldout: Sequence[Curve], path: Path, title: str) -> None:
    """Writes a PNG with the trained reward on the left and the held-out scores on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, curves, name in zip(panels, (trained, heldout), ("training prompts", "held-out prompts"), strict=True):
        for curve in curves:
            y, band = np.asarray(curve.y), np.asarray(curve.band)
            (line,) = panel.plot(
                curve.x, y, label=plot_label(curve.label), linewidth=1.8, marker="o" if len(y) < 20 else None, ms=4
            )
            if band.any():
                panel.fill_between(curve.x, y - band, y + band, color=line.get_color(), alpha=0.2, linewidth=0)
        panel.set_title(name, fontsize=11)
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.3)
        if curves:
            panel.legend(frameon=False, fontsize=9)
    figure.suptitle(plot_label(title), fontsize=12)
    write_figure(figure, path)


def metric_curve(lines: Sequence[Mapping[str, float]], key: str, label: str, band_key: str | None = None) -> Curve:
    """The values of one log key over iterations; lines without the key are left out."""
    rows = [line for line in lines if key in line]
    band = [row.get(band_key, 0.0) if band_key else 0.0 for row in rows]
    return Curve(label, [row["iteration"] for row in rows], [row[key] for row in rows], band)


def _tile_side(width: int) -> int:
    """Small pictures are enlarged by a whole factor, so that their pixels stay visible as they are."""
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
    """Saves a picture as a new file, in the format of its suffix (`PICTURE_FORMATS`).

    Raises:
        UsageError: there is a file of that name.
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
    """Writes a new file; an unfinished one is removed. Raises `FileExistsError`."""
    with path.open("xb") as file:
        try:
            picture.save(file, form)
        except BaseException:
            # not the whole picture, and nobody else's: the name was free
            path.unlink(missing_ok=True)
            raise
