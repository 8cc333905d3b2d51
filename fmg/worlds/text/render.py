"""Renders signs: dark letters in fixed slots, anti-aliased, on a board of one colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fmg.worlds.text.prompts import SLOTS

FloatArray = NDArray[np.float32]

IMAGE_SIZE = 24
"""Side of an image in pixels; the recogniser reads it at twice the size."""
FONT_SIZE = 12
"""Of Pillow's own scalable font (Aileron), in pixels."""
PITCH = 8.0
"""Distance between the centres of neighbouring letters, in pixels: the width of a token, so each letter has its own."""
INK_RGB = (20, 20, 30)
BOARD_RGB = ((255, 255, 255), (250, 235, 190), (210, 230, 250))


@dataclass(frozen=True)
class Sign:
    """A sign to render.

    Attributes:
        word: `SLOTS` letters.
        board: row of `BOARD_RGB`.
    """

    word: str
    board: int


def random_sign(word: str, rng: np.random.Generator) -> Sign:
    """A sign with a random board."""
    return Sign(word, int(rng.integers(len(BOARD_RGB))))


def render(signs: Sequence[Sign]) -> Float[np.ndarray, "b 3 24 24"]:
    """Renders signs as float32 RGB in [0, 1]."""
    cover = np.stack([_cover(sign.word) for sign in signs])[:, None]
    ink, board = (np.asarray(rgb, dtype=np.float32)[..., None, None] / 255 for rgb in (INK_RGB, BOARD_RGB))
    behind = board[[sign.board for sign in signs]]
    images: FloatArray = (behind + cover * (ink - behind)).astype(np.float32)
    return images


@lru_cache(maxsize=4096)
def _cover(word: str) -> FloatArray:
    """Share of each pixel that is ink."""
    picture = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
    pen = ImageDraw.Draw(picture)
    for slot, letter in enumerate(word):
        x = IMAGE_SIZE / 2 + (slot - (SLOTS - 1) / 2) * PITCH
        pen.text((x, IMAGE_SIZE / 2), letter, font=_font(), fill=255, anchor="mm")
    return np.asarray(picture, dtype=np.float32) / np.float32(255)


@lru_cache
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(FONT_SIZE)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType")
    return font
