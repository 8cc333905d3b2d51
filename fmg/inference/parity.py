"""How much the images of two runtimes may differ if both compute the same in the same precision. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmg.core.errors import GateError
from fmg.inference.artifact.manifest import Precision

IMAGES_ALLOWED: Mapping[Precision, float] = {"fp32": 1e-4}
"""Largest absolute difference of one value in [0, 1] in 99 of 100 images; other precisions are judged by PSNR."""
LEVEL = 1 / 255
"""Largest difference of any value of any fp32 image: one level of 8 bits. Few-step maps are stiff in places, where
one image in hundreds amplifies rounding, as it does between two batch sizes in torch."""
PSNR_ALLOWED: Mapping[Precision, float] = {"bf16": 25.0, "fp16": 30.0, "fp8": 20.0, "int8": 20.0}
"""Smallest peak signal-to-noise ratio over all images together, in dB."""


@dataclass(frozen=True)
class ImageParity:
    """How much images differ.

    Attributes:
        max_abs: largest difference of a value in [0, 1].
        p99_abs: 99th percentile over images of the largest difference in an image.
        mean_abs: mean difference.
        psnr: peak signal-to-noise ratio of all images together, dB.
        images: how many.
        not_finite: images with NaN or infinite values on either side; the other fields are then NaN.
    """

    max_abs: float
    p99_abs: float
    mean_abs: float
    psnr: float
    images: int
    not_finite: int

    def passed(self, precision: Precision) -> bool:
        return not self.problem(precision)

    def problem(self, precision: Precision) -> str:
        """Why they do not pass; empty when they do."""
        if self.not_finite:
            return f"{self.not_finite} of {self.images} images have values that are not finite"
        if precision in IMAGES_ALLOWED:
            most = IMAGES_ALLOWED[precision]
            close = self.p99_abs <= most and self.max_abs <= LEVEL
            bound = f"a difference of {most:g} in 99 of 100 images, of {LEVEL:.4f} in any"
        else:
            close = self.psnr >= PSNR_ALLOWED[precision]
            bound = f"PSNR of {PSNR_ALLOWED[precision]:g} dB or more"
        return "" if close else f"allowed for {precision}: {bound}"


def check_same_images(
    ours: NDArray[np.float32], expected: NDArray[np.float32], precision: Precision, what: str, advice: str
) -> float:
    """The largest difference of a value of images (n, 3, h, w) in [0, 1].

    Args:
        ours: images of a backend.
        expected: the same images by torch.
        precision: precision of the network.
        what: plural subject of the error message.
        advice: what to do then.

    Raises:
        GateError: they differ by more than the images of an exported artifact may.
    """
    difference = Difference()
    difference.add(ours, expected)
    found = difference.result()
    if problem := found.problem(precision):
        raise GateError(
            f"{what} differ from torch's: {found.max_abs:.2g} at most over {found.images} images,"
            f" {found.p99_abs:.2g} in 99 of 100, PSNR {found.psnr:.0f} dB ({problem})",
            advice,
        )
    return found.max_abs


class Difference:
    """Statistics of differences, batch by batch."""

    def __init__(self) -> None:
        self._largest: list[NDArray[np.float64]] = []
        self._values, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, images: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        """Adds images (b, 3, h, w) in [0, 1] of both sides."""
        difference = np.abs(images.astype(np.float64) - expected)
        self._largest.append(difference.reshape(len(images), -1).max(1))
        self._values += difference.size
        self._sum += float(difference.sum())
        self._squares += float(np.square(difference).sum())

    @property
    def not_finite(self) -> int:
        """Images with a value that is not finite on either side."""
        return sum(int((~np.isfinite(largest)).sum()) for largest in self._largest)

    def result(self) -> ImageParity:
        """The statistics of all images added, of which there must be at least one."""
        largest = np.concatenate(self._largest)
        p99 = float(np.quantile(largest, 0.99, method="higher"))
        mean_square = self._squares / self._values
        # 200 dB for equal images, as JSON has no infinity; np.minimum keeps a NaN, which min() would not
        psnr = float(np.minimum(200.0, -10 * np.log10(mean_square))) if mean_square else 200.0
        return ImageParity(float(largest.max()), p99, self._sum / self._values, psnr, len(largest), self.not_finite)
