"""How much an image looks like a printed sign, whatever its text. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import RewardError
from fmg.core.types import RewardOutput
from fmg.worlds.configs import TextFidelityConfig
from fmg.worlds.text.render import BOARD_RGB, IMAGE_SIZE, INK_RGB, FloatArray

Images = Float[np.ndarray, "b 3 24 24"]

OFF_PALETTE = 0.15
"""Mean distance (RGB in [0, 1]) from the mixtures of ink and nearest board at which `palette` reaches 0."""
INK_SHARE = 0.08
"""Share of the pixels, the darkest ones, that count for `contrast`: less than the ink of any word."""
FULL_INK = 0.84
"""Mean opacity of those pixels in the faintest render."""
MARGIN = 5
"""Rows at the top and at the bottom that no letter reaches."""
DIRTY = 0.25
"""Mean opacity of the margins at which `margin` reaches 0."""

_INK = np.asarray(INK_RGB, dtype=np.float32) / 255
_BOARD = np.asarray(BOARD_RGB, dtype=np.float32) / 255


@dataclass(frozen=True)
class Fidelity:
    """Likeness to a dark print on one board, each part (b,) in [0, 1]; 1 on true renders.

    Attributes:
        palette: 1 - (mean distance of the pixels to the line between ink and the best board) / `OFF_PALETTE`.
        contrast: mean opacity of the darkest pixels, relative to `FULL_INK`; faint text has little.
        margin: 1 - (mean opacity above and below the text) / `DIRTY`.
    """

    palette: FloatArray
    contrast: FloatArray
    margin: FloatArray

    @property
    def total(self) -> FloatArray:
        """`palette * contrast * margin`."""
        return self.palette * self.contrast * self.margin


def fidelity(images: Images) -> Fidelity:
    """Compare images in [0, 1] with prints in the colours of the text world."""
    pixels = np.moveaxis(np.asarray(images, dtype=np.float32), 1, -1)
    distance = np.empty((len(_BOARD), len(images)), dtype=np.float32)
    opacity = np.empty((len(_BOARD), *pixels.shape[:3]), dtype=np.float32)
    for row, board in enumerate(_BOARD):
        axis = _INK - board
        opacity[row] = np.clip((pixels - board) @ axis / (axis @ axis), 0, 1)
        distance[row] = np.linalg.norm(pixels - board - opacity[row][..., None] * axis, axis=-1).mean((1, 2))
    best = distance.argmin(0), np.arange(len(images))
    inked = opacity[best]
    flat = inked.reshape(len(images), -1)
    darkest = np.sort(flat, axis=-1)[:, -round(INK_SHARE * flat.shape[1]) :].mean(-1)
    margins = np.concatenate([inked[:, :MARGIN], inked[:, -MARGIN:]], axis=1).mean((1, 2))
    return Fidelity(
        palette=np.clip(1 - distance[best] / OFF_PALETTE, 0, 1),
        contrast=np.minimum(darkest / FULL_INK, 1),
        margin=np.clip(1 - margins / DIRTY, 0, 1),
    )


class TextFidelity:
    """Likeness to a printed sign, whatever its text: `palette * contrast * margin`, in [0, 1].

    Parts, each in [0, 1]: `palette` (the pixels are mixtures of the ink and one board), `contrast` (the text is not
    faint), `margin` (nothing above and below it).
    """

    def __init__(self, config: TextFidelityConfig) -> None:
        self._config = config

    def __call__(self, images: Float[Tensor, "b 3 24 24"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1].

        Raises:
            RewardError: for images of any other size.
        """
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise RewardError(
                f"The reward 'text-fidelity' needs images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, but got "
                f"{tuple(images.shape)}",
                "Use it with the models of the text world.",
            )
        judged = fidelity(np.asarray(images.detach().float().cpu()))
        parts = {name: torch.from_numpy(getattr(judged, name)) for name in ("palette", "contrast", "margin")}
        return RewardOutput(torch.from_numpy(judged.total), parts)
