"""FLUX's token layout: 2x2 patches of the latent image become tokens, each with its position. Imports no torch.

`pack` and `unpack` take torch tensors and numpy arrays alike, since both have `reshape` and `swapaxes` and exported
artifacts are sampled without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PATCH = 2

Array = TypeVar("Array", bound=Any)


def pack(latents: Array) -> Array:
    """(b, c, h, w) as tokens (b, h/2 * w/2, 4c), row by row, as `FluxPipeline._pack_latents`."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    # (b, c, rows, i, columns, j) to (b, rows, columns, c, i, j)
    ordered = patches.swapaxes(3, 4).swapaxes(1, 2).swapaxes(2, 3)
    tokens: Array = ordered.reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)
    return tokens


def unpack(tokens: Array, height: int, width: int) -> Array:
    """The inverse of `pack` for latents of the given height and width."""
    b, _, channels = tokens.shape
    c = channels // (PATCH * PATCH)
    patches = tokens.reshape(b, height // PATCH, width // PATCH, c, PATCH, PATCH)
    latents: Array = patches.swapaxes(2, 3).swapaxes(1, 2).swapaxes(3, 4).reshape(b, c, height, width)
    return latents


def image_ids(height: int, width: int) -> NDArray[np.float32]:
    """Rotary positions (0, row, column) of the tokens of an `height` x `width` latent, (tokens, 3)."""
    # recipes read PATCH, and are resolved without numpy
    import numpy as np

    rows, columns = height // PATCH, width // PATCH
    ids = np.zeros((rows, columns, 3), np.float32)
    ids[..., 1] = np.arange(rows, dtype=np.float32)[:, None]
    ids[..., 2] = np.arange(columns, dtype=np.float32)
    return ids.reshape(rows * columns, 3)
