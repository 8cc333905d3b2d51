"""The reward."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from fmg.core.types import RewardOutput
from fmg_warmth.configs import WarmthConfig


class Warmth:
    """Mean red minus mean blue of a picture; parts `red` and `blue`."""

    def __init__(self, config: WarmthConfig) -> None:
        self._blue = config.blue

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1]."""
        red, blue = images[:, 0].mean(dim=(1, 2)), images[:, 2].mean(dim=(1, 2))
        return RewardOutput(total=red - self._blue * blue, parts={"red": red, "blue": blue})
