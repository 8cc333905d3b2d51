"""8-bit pixels of images. Imports no torch and no Pillow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_uint8(images: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Images (..., 3, h, w) as 8-bit pixels (..., h, w, 3): clamped to [0, 1] and rounded to the nearest level."""
    levels = np.rint(images.clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(levels, -3, -1))
