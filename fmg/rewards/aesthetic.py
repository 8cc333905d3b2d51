"""LAION's aesthetic score (Schuhmann, improved-aesthetic-predictor, 2022; the head `sac+logos+ava1-l14-linearMSE`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CheckpointError
from fmg.core.types import RewardOutput
from fmg.registry import rewards
from fmg.rewards.affine import affine_head
from fmg.rewards.checkpoints import read_tensors
from fmg.rewards.clip_family import ImageEncoder, load_vision
from fmg.rewards.images import resize_and_crop
from fmg.rewards.model_configs import AestheticConfig
from fmg.rewards.network import Files, NetworkReward, Score


@rewards.register("aesthetic", AestheticConfig)
def aesthetic(config: AestheticConfig) -> NetworkReward:
    """The head on the unit-length image embedding; prompts do not matter.

    Images are rounded to 8 bits, resized by Pillow and cropped as OpenAI's CLIP does.
    """
    return NetworkReward("aesthetic", config, _load)


def _load(files: Files, device: torch.device, dtype: torch.dtype) -> Score:
    head = affine_head(read_tensors(files["head"].path))
    model, config = load_vision(files["model"], device, dtype)
    if len(head.weight) != config.projection_dim:
        raise CheckpointError(
            f"The aesthetic head takes {len(head.weight)} numbers and the model gives {config.projection_dim}",
            "Set weights and head to files that belong together.",
        )
    encoder = ImageEncoder(model, config, resize_and_crop)

    def score(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        return RewardOutput(head(encoder(images)), {})

    return score
