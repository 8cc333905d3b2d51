"""The rewards of the shapes world: prompt adherence, and the image quality that is held out from training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fmg.core.errors import RefusedImageError
from fmg.core.types import RewardOutput
from fmg.rewards.images import check_finite
from fmg.worlds.configs import ShapesQualityConfig, ShapesRewardConfig
from fmg.worlds.shapes.prompts import parse_prompt
from fmg.worlds.shapes.scene import IMAGE_SIZE
from fmg.worlds.shapes.verifier import quality, verify


class ReadsPrompts:
    """A reward that reads its prompts in the grammar of the shapes world."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Parses every prompt.

        Raises:
            UsageError: naming the first prompt outside the grammar, and the grammar.
        """
        for prompt in prompts:
            parse_prompt(prompt)


class ShapesReward(ReadsPrompts):
    """Agreement of an image with the scene that its prompt describes (`fmg.worlds.shapes.verifier.verify`).

    The total is the part named by `score`. Parts, each in [0, 1]: `color`, `shape`, `position`, `count`, `soft`,
    `strict`.
    """

    def __init__(self, config: ShapesRewardConfig) -> None:
        self._score = config.score

    def __call__(self, images: Float[Tensor, "b 3 32 32"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1].

        Raises:
            RefusedImageError: for images of any other size.
            UsageError: for a prompt outside the grammar of the shapes world.
        """
        verdict = verify(_pixels("shapes", images), [parse_prompt(prompt) for prompt in prompts])
        parts = {
            "color": torch.from_numpy(verdict.color),
            "shape": torch.from_numpy(verdict.shape),
            "position": torch.from_numpy(verdict.position),
            "count": torch.from_numpy(verdict.count),
            "soft": torch.from_numpy(verdict.soft),
            "strict": torch.from_numpy(verdict.strict),
        }
        return RewardOutput(parts[self._score], parts)


class ShapesQuality:
    """Image quality whatever the prompt: `recognisable * sharpness * palette_fidelity`.

    Parts, each in [0, 1]: `recognisable` (exactly one object, whose kind can be told), `sharpness`, `palette`.
    """

    def __init__(self, config: ShapesQualityConfig) -> None:
        self._config = config

    def __call__(self, images: Float[Tensor, "b 3 32 32"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1].

        Raises:
            RefusedImageError: for images of any other size.
        """
        judged = quality(_pixels("shapes-quality", images))
        parts = {
            "recognisable": torch.from_numpy(judged.recognisable),
            "sharpness": torch.from_numpy(judged.sharpness),
            "palette": torch.from_numpy(judged.palette_fidelity),
        }
        return RewardOutput(torch.from_numpy(judged.total), parts)


def check_pixels(name: str, images: Float[Tensor, "b 3 h w"]) -> None:
    """Refuses images that the reward `name` cannot score.

    Raises:
        RefusedImageError: they have another size than those of this world.
        RewardError: they have values that are not finite.
    """
    if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise RefusedImageError(
            f"The reward '{name}' needs images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, but got {tuple(images.shape)}",
            "Use it with the models of the shapes world.",
        )
    check_finite(name, images)


def _pixels(name: str, images: Float[Tensor, "b 3 h w"]) -> NDArray[np.float32]:
    check_pixels(name, images)
    array: NDArray[np.float32] = images.detach().float().cpu().numpy()
    return array
