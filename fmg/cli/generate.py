"""`fmg generate`: pictures from prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli.console import print_json, stderr, stdout
from fmg.cli.observers import LOADING, reporter_for
from fmg.cli.options import (
    AsJson,
    BatchSize,
    Device,
    Dtype,
    Grid,
    Offline,
    check_grid,
    checked_folder,
    checked_prompts,
    given_text,
)
from fmg.core.errors import FmgError
from fmg.core.events import StageProgress

if TYPE_CHECKING:
    from PIL.Image import Image

_SLUG_LENGTH = 40


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts, each in quotes.")],
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="TARGET", help="A model or a run folder.", show_default="the newest run"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, metavar="N", help="Network calls an image.", show_default="the target's"),
    ] = None,
    grid: Grid = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the first image of each prompt.")] = 0,
    num: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="N", help="Images a prompt, with consecutive seeds.")
    ] = 1,
    out: Annotated[str, typer.Option(metavar="DIR", help="Where to write; nothing is overwritten.")] = "images",
    sheet: Annotated[bool, typer.Option("--sheet", help="Write one more picture with all images on it.")] = False,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    batch_size: BatchSize = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Draw pictures from prompts and write them as PNG files."""
    texts = checked_prompts(prompts)
    given_text(source, "--from")
    check_grid(grid)
    folder = checked_folder(out, "--out")

    orders = [(text, seed + i) for text in texts for i in range(num)]
    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.data.pictures import GridRow, sample_grid, to_pil
        from fmg.inference import load

        generator = load(source, device=device, dtype=dtype, batch_size=batch_size)
        drawn = generator.generate(
            [text for text, _ in orders],
            [key for _, key in orders],
            steps=steps,
            grid=grid,
            progress=lambda done, total: reporter(StageProgress("images", done, total)),
        )
    pictures = [(to_pil(image), text) for image, (text, _) in zip(drawn.images, orders, strict=True)]
    if sheet:
        rows = [GridRow(text, drawn.images[i * num : (i + 1) * num]) for i, text in enumerate(texts)]
        pictures.append((sample_grid(rows, source or "newest run"), "sheet"))
    files = save_pictures(pictures, folder)
    if as_json:
        images = [
            {"path": str(file), "prompt": text, "seed": key} for file, (text, key) in zip(files, orders, strict=False)
        ]
        print_json({"images": images, "timings_ms": dict(drawn.timings_ms)})
        return
    console = stdout()
    for file in files:
        console.print(str(file), soft_wrap=True)


def save_pictures(pictures: Sequence[tuple[Image, str]], folder: Path) -> list[Path]:
    """Saves pictures as `NNNN-<text>.png` in `folder`, numbered on from the highest number there.

    Files are created exclusively, so two processes that write into one folder cannot overwrite each other.

    Raises:
        FmgError: when the system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(match[0]) for file in folder.iterdir() if (match := re.match(r"\d+", file.name))]
        first = max(taken, default=0) + 1
        return [_save(picture, folder, number, text) for number, (picture, text) in enumerate(pictures, first)]
    except OSError as error:
        raise FmgError(f"--out {folder} cannot be written: {error.strerror}", "Name another folder.") from None


def _save(picture: Image, folder: Path, number: int, text: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower())[:_SLUG_LENGTH].strip("-") or "image"
    path = folder / f"{number:04d}-{slug}.png"
    try:
        with path.open("xb") as file:
            picture.save(file, "PNG")
    except FileExistsError:
        return _save(picture, folder, number + 1, text)
    return path
