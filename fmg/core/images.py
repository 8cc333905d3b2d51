"""Image files of any origin: which formats are read, how many pixels they may have, and every error as one line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from fmg.core.errors import FmgError, UsageError, reason

T = TypeVar("T")

MAX_PIXELS = 1 << 25
"""Maximum pixels of an image: 33,554,432, such as 5792 x 5792: 384 MiB as floats, which a reward doubles."""
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "PPM")
"""Formats that Pillow may try; its others are rarely images, and one runs another program (EPS)."""


def decoded(source: Path | str | bytes, use: Callable[[Image.Image], T], max_pixels: int = MAX_PIXELS) -> T:
    """The result of `use` on an image file, or on the bytes of one. The size is checked before any pixel is decoded.

    Args:
        source: a path, or the content of a file.
        use: gets the first frame, before it is decoded; an error in it counts as an error of the file.
        max_pixels: maximum number of pixels.

    Raises:
        UsageError: for what is not an image of a known format, is damaged, or has no pixels or more than `max_pixels`.
    """
    name = "The image" if isinstance(source, bytes) else f"The image '{source}'"
    try:
        with warnings.catch_warnings():
            # Pillow warns at its own limit, which is higher, and about damage that does not matter
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_known()) as picture:
                _check_size(name, picture, max_pixels)
                return use(picture)
    except (FmgError, MemoryError):
        raise
    except FileNotFoundError:
        raise UsageError(f"There is no image file '{source!s}'", "Check the path.") from None
    except Image.DecompressionBombError:
        raise _too_large(name, max_pixels) from None
    except UnidentifiedImageError:
        raise UsageError(f"{name} is not an image file", f"Give one of {', '.join(FORMATS)}.") from None
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise UsageError(f"{name} cannot be decoded: {reason(error)}", "Give an undamaged image.") from error


@cache
def _known() -> list[str]:
    """The formats that this Pillow reads: not every build has AVIF."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(name: str, picture: Image.Image, max_pixels: int) -> None:
    width, height = picture.size
    if width * height == 0:
        raise UsageError(f"{name} has no pixels ({width} x {height})", "Give an image with pixels.")
    if width * height > max_pixels:
        raise _too_large(name, max_pixels)


def _too_large(name: str, max_pixels: int) -> UsageError:
    return UsageError(f"{name} has more than {max_pixels:,} pixels", "Scale it down first.")
