"""Image files as tensors, and the exact preprocessing of the published rewards.

The results do not depend on installed packages: resizing is Pillow's on 8-bit pixels or torch's on floats, as published
by the authors of each reward. Images are RGB, (b, 3, h, w), in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fmg.core.errors import RefusedImageError, RewardError
from fmg.core.images import MAX_PIXELS, decoded

MAX_ASPECT = 200

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

SMOOTH_TOLERANCE = 2.5 / 255
"""Largest difference of a pixel between Pillow's resize of 8-bit pixels and torch's of floats."""

Rounding = Literal["half-even", "down"]

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def read_image(source: Path | str | bytes, max_pixels: int = MAX_PIXELS) -> Float[Tensor, "3 h w"]:
    """An image file, or the bytes of one, as RGB floats in [0, 1].

    Transparency is composited on white, as a viewer shows it. Grey is repeated; 16-bit grey keeps its precision; 16-bit
    colour is read as 8-bit; CMYK is converted without colour management; the first frame of an animation counts; the
    orientation in EXIF is ignored, as the published rewards do.

    Raises:
        UsageError: as `fmg.core.images.decoded`, and for pixels of no known range (32-bit integers and floats).
    """
    return decoded(source, _to_tensor, max_pixels)


def records_gradients(images: Tensor) -> bool:
    """Whether scores of these images have to be differentiable."""
    return torch.is_grad_enabled() and images.requires_grad


def to_bytes(images: Float[Tensor, "b 3 h w"]) -> NDArray[np.uint8]:
    """8-bit pixels (b, h, w, 3): `round(255 x)`, halves to even, clamped."""
    levels = (images.detach().float() * 255).round_().clamp_(0, 255).to(torch.uint8)
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).cpu().numpy())


def resize_and_crop(
    images: Float[Tensor, "b 3 h w"], side: int, rounding: Rounding = "half-even"
) -> Float[Tensor, "b 3 side side"]:
    """The shorter edge to `side` by Pillow's bicubic filter on 8-bit pixels, then the centre square.

    The longer edge becomes `int(side * longer / shorter)`. The crop starts at `(n - side) / 2`, rounded half to even
    as torchvision does, or down as transformers does.

    Returns:
        What `pillow_bicubic` does, on the device of `images`.
    """
    check_drawable(images)
    resized = pillow_bicubic(images, _shorter_edge(images.shape[-2], images.shape[-1], side))
    return _centre(resized, side, rounding)


def pillow_bicubic(images: Float[Tensor, "b 3 h w"], size: tuple[int, int]) -> Float[Tensor, "b 3 height width"]:
    """Images rounded to 8 bits and resized to `size` by Pillow's bicubic filter: levels of 1/255.

    Rounding has no gradient. Images that record one are resized as floats by torch's antialiased bicubic filter, which
    has the same weights, one axis after the other as Pillow does, so the results differ only by Pillow's rounding: by
    at most `SMOOTH_TOLERANCE`.
    """
    height, width = size
    if records_gradients(images):
        # the filter overshoots, and Pillow clips after each axis
        across = _resized(images, (images.shape[-2], width), "bicubic").clamp(0, 1)
        return _resized(across, size, "bicubic").clamp(0, 1)
    drawn = [np.asarray(Image.fromarray(x).resize((width, height), Image.Resampling.BICUBIC)) for x in to_bytes(images)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).to(images.device).float() / 255


def resize_and_crop_floats(images: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b 3 side side"]:
    """The shorter edge to `side` by torch's antialiased bilinear filter on floats, then the centre square.

    What `torchvision.transforms.Resize(side)` and `CenterCrop(side)` do to a tensor.
    """
    check_drawable(images)
    resized = _resized(images, _shorter_edge(images.shape[-2], images.shape[-1], side), "bilinear")
    return _centre(resized, side, "half-even")


def resize_and_pad(images: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b 3 side side"]:
    """Resizes the longer edge to `side` (torch's antialiased bicubic filter on floats) and pads with black to a square.

    HPSv2's `ResizeMaxSize` under torchvision 0.17 and newer. That code raises on an oblong image whose longer edge is
    `side` already; here it is padded as well.
    """
    check_drawable(images)
    scale = side / max(images.shape[-2:])
    height, width = (max(1, round(n * scale)) for n in images.shape[-2:])
    resized = _resized(images, (height, width), "bicubic")
    below, beside = side - height, side - width
    return F.pad(resized, (beside // 2, beside - beside // 2, below // 2, below - below // 2))


def normalize(
    images: Float[Tensor, "b 3 h w"], mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Float[Tensor, "b 3 h w"]:
    """`(x - mean) / std` by channel."""
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def check_drawable(images: Float[Tensor, "b 3 h w"]) -> None:
    """Refuses images for which no resize is defined.

    Raises:
        RefusedImageError: for images without pixels, and those more than `MAX_ASPECT` times as long as wide.
    """
    height, width = images.shape[-2:]
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise RefusedImageError(
            f"An image of {width} x {height} pixels cannot be scored",
            f"Give non-empty images whose longer side is at most {MAX_ASPECT} times the shorter one.",
        )


def check_finite(name: str, images: Float[Tensor, "b 3 h w"]) -> None:
    """Refuses images of a broken model, which rounding to 8 bits would hide.

    Raises:
        RewardError: for values that are not finite; names the reward.
    """
    # unlike isfinite, without a copy of the images
    if images.numel() and not all(bound.isfinite() for bound in images.aminmax()):
        raise RewardError(f"The reward '{name}' got an image that is not finite", "Look for the cause in the model.")


def _to_tensor(picture: Image.Image) -> Float[Tensor, "3 h w"]:
    if picture.mode in _SIXTEEN_BIT:
        grey = torch.from_numpy(np.asarray(picture).astype(np.float32)).div_(65535)
        return grey.expand(3, -1, -1).clone()
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of unknown range (mode {picture.mode}) instead of 8 or 16 bits")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    pixels = np.array(picture.convert("RGB"))
    # in place: a large image should not be in memory twice
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)


def _resized(images: Float[Tensor, "b 3 h w"], size: tuple[int, int], mode: str) -> Float[Tensor, "b 3 height width"]:
    """By one of torch's antialiased filters on floats."""
    if size == tuple(images.shape[-2:]):
        return images.float()
    return F.interpolate(images.float(), size, mode=mode, antialias=True, align_corners=False)


def _centre(images: Float[Tensor, "b 3 h w"], side: int, rounding: Rounding) -> Float[Tensor, "b 3 side side"]:
    top, left = (_offset(length, side, rounding) for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def _shorter_edge(height: int, width: int, side: int) -> tuple[int, int]:
    shorter = min(height, width)
    # int of the quotient, not integer division: as published, where rounding of the quotient may differ
    longer = int(side * max(height, width) / shorter)
    return (side, longer) if height <= width else (longer, side)


def _offset(length: int, side: int, rounding: Rounding) -> int:
    return round((length - side) / 2) if rounding == "half-even" else (length - side) // 2
