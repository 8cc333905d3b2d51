"""The fidelity reward of the text world, which keeps `ocr-logp` from being satisfied by faint or smeared letters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import RewardError
from fmg.core.types import RewardOutput
from fmg.registry import rewards
from fmg.worlds.configs import TextFidelityConfig
from fmg.worlds.text.fidelity import fidelity
from fmg.worlds.text.render import IMAGE_SIZE


@rewards.register("text-fidelity", TextFidelityConfig)
class TextFidelity:
    """Likeness to a printed sign, whatever it says: `palette * contrast * margin`, in [0, 1].

    Parts, each in [0, 1]: `palette` (the pixels are mixtures of the ink and one board), `contrast` (the text is not
    faint), `margin` (nothing above and below it).
    """

    def __init__(self, config: TextFidelityConfig) -> None:
        self._config = config

    def __call__(self, images: Float[Tensor, "b 3 24 24"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1].

        Raises:
            RewardError: for images of another size.
        """
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise RewardError(
                f"The reward 'text-fidelity' reads pictures of {IMAGE_SIZE} x {IMAGE_SIZE} and got "
                f"{tuple(images.shape)}",
                "Use it with the models of the text world.",
            )
        judged = fidelity(np.asarray(images.detach().float().cpu()))
        parts = {name: torch.from_numpy(getattr(judged, name)) for name in ("palette", "contrast", "margin")}
        return RewardOutput(torch.from_numpy(judged.total), parts)
