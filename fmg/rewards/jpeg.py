"""Size of an image as a JPEG file (DDPO, Black et al., arXiv 2305.13301, section 5.1; scales of Flow-GRPO's code)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fmg.core.errors import RefusedImageError
from fmg.core.types import RewardOutput
from fmg.rewards.configs import JpegConfig
from fmg.rewards.images import check_finite, to_bytes

# libjpeg's limit; the format's own is 35 higher
_MAX_SIDE = 65500


class JpegSize:
    """A function of the file size; part `kilobytes`.

    Images are rounded to 8 bits (`round(255 x)`, halves to even) and written by Pillow with its default chroma
    subsampling. Sizes vary a little with the JPEG library that Pillow was built with.

    Args:
        quality: JPEG quality.
        score: total from size in kB (1000 bytes).
    """

    def __init__(self, quality: int, score: Callable[[Tensor], Tensor]) -> None:
        self._quality = quality
        self._score = score

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1]; prompts do not matter."""
        check_finite("jpeg", images)
        if max(images.shape[-2:]) > _MAX_SIDE:
            raise RefusedImageError(f"A JPEG file holds at most {_MAX_SIDE} pixels per side", "Scale the images down.")
        kilobytes = torch.tensor([self._bytes(Image.fromarray(pixels)) / 1000 for pixels in to_bytes(images)])
        return RewardOutput(self._score(kilobytes), {"kilobytes": kilobytes})

    def _bytes(self, picture: Image.Image) -> int:
        file = BytesIO()
        picture.save(file, format="JPEG", quality=self._quality)
        return file.tell()


def compressibility(config: JpegConfig) -> JpegSize:
    """`-kB / 500`: the smaller the file, the better."""
    return JpegSize(config.quality, lambda kilobytes: -kilobytes / 500)


def incompressibility(config: JpegConfig) -> JpegSize:
    """The file size in kB: the larger, the better."""
    return JpegSize(config.quality, lambda kilobytes: kilobytes)
