"""How much a picture looks like a printed sign, whatever it says. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from fmg.worlds.text.render import BOARD_RGB, INK_RGB, FloatArray

Images = Float[np.ndarray, "b 3 24 24"]

OFF_PALETTE = 0.15
"""Mean distance (RGB in [0, 1]) from the mixtures of ink and nearest board at which `palette` reaches 0."""
INK_SHARE = 0.08
"""Share of the pixels, the darkest, that are looked at for `contrast`: less than a third of the ink of any word."""
CLEAN_BLUR, BLURRED = 0.13, 0.4
"""Share of the ink that lies in half-tones: of clean renders, and where `sharpness` reaches 0."""

_INK = np.asarray(INK_RGB, dtype=np.float32) / 255
_BOARD = np.asarray(BOARD_RGB, dtype=np.float32) / 255


@dataclass(frozen=True)
class Fidelity:
    """Likeness to a dark print on one board, each part (b,) in [0, 1].

    Attributes:
        palette: 1 - (mean distance of the pixels to the line between ink and the best board) / `OFF_PALETTE`.
        contrast: mean opacity of the darkest pixels.
        sharpness: 1 where no more of the ink is half-tone than in clean renders, falling to 0 at `BLURRED`.
    """

    palette: FloatArray
    contrast: FloatArray
    sharpness: FloatArray

    @property
    def total(self) -> FloatArray:
        """`palette * contrast * sharpness`: near 1 on true renders."""
        return self.palette * self.contrast * self.sharpness


def fidelity(images: Images) -> Fidelity:
    """Compare pictures in [0, 1] with prints in the colours of the text world."""
    pixels = np.moveaxis(np.asarray(images, dtype=np.float32), 1, -1).reshape(len(images), -1, 3)
    distance = np.empty((len(images), len(_BOARD)), dtype=np.float32)
    opacity = np.empty((*distance.shape, pixels.shape[1]), dtype=np.float32)
    for column, board in enumerate(_BOARD):
        axis = _INK - board
        share = np.clip((pixels - board) @ axis / (axis @ axis), 0, 1)
        distance[:, column] = np.linalg.norm(pixels - board - share[..., None] * axis, axis=-1).mean(-1)
        opacity[:, column] = share
    best = distance.argmin(-1)
    rows = np.arange(len(images))
    ink_share = np.sort(opacity[rows, best], axis=-1)
    darkest = ink_share[:, -round(INK_SHARE * pixels.shape[1]) :].mean(-1)
    halftone = np.minimum(ink_share, 1 - ink_share).sum(-1) / np.maximum(ink_share.sum(-1), 1e-6)
    return Fidelity(
        palette=np.clip(1 - distance[rows, best] / OFF_PALETTE, 0, 1),
        contrast=darkest,
        sharpness=np.clip((BLURRED - halftone) / (BLURRED - CLEAN_BLUR), 0, 1).astype(np.float32),
    )
