from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from fmg.core.errors import UsageError
from fmg.registry import rewards


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 64, 64, generator=generator)
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    return torch.stack([torch.full((3, 64, 64), 0.5), ramp, noise])


def test_size_and_sign() -> None:
    images = pictures()
    larger = rewards.build("jpeg-incompressibility")(images, ["", "", ""])
    smaller = rewards.build("jpeg-compressibility")(images, ["", "", ""])
    pixels = (images[2].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=95)
    assert float(larger.total[2]) == pytest.approx(len(file.getvalue()) / 1000)
    torch.testing.assert_close(smaller.total, -larger.total / 500)
    assert larger.total.diff().gt(0).all()
    # kB of a flat picture, a ramp and noise at 64 px, as measured with libjpeg-turbo
    torch.testing.assert_close(larger.total, torch.tensor([0.69, 1.15, 5.4]), rtol=0.25, atol=0)


def test_quality_is_an_option() -> None:
    images = pictures()
    coarse = rewards.build("jpeg-incompressibility", {"quality": 30})(images, ["", "", ""]).total
    assert bool((coarse < rewards.build("jpeg-incompressibility")(images, ["", "", ""]).total)[1:].all())
    with pytest.raises(UsageError, match="quality"):
        rewards.build("jpeg-incompressibility", {"quality": 0})


def test_pixels_are_rounded_not_cut() -> None:
    score = rewards.build("jpeg-incompressibility", {"quality": 100})
    levels = torch.arange(64 * 64).reshape(64, 64).remainder(256).float().expand(1, 3, 64, 64)
    exact = score(levels / 255, [""]).total
    below = score((levels / 255 - 0.4 / 255).clamp(0, 1), [""]).total
    assert torch.equal(exact, below)
