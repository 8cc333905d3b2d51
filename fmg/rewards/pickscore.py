"""PickScore (Kirstain et al., Pick-a-Pic, arXiv 2305.01569, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.types import RewardOutput
from fmg.registry import rewards
from fmg.rewards.clip_family import ClipEncoder, load_clip
from fmg.rewards.images import resize_and_crop
from fmg.rewards.model_configs import PickScoreConfig
from fmg.rewards.network import Files, NetworkReward, Score

NORMALIZER = 26.0


@rewards.register("pickscore", PickScoreConfig)
def pickscore(config: PickScoreConfig) -> NetworkReward:
    """`exp(logit_scale) cos(image, prompt)`, over 26 when normalized; part `raw` is not divided.

    Images are rounded to 8 bits, resized by Pillow and cropped as the image processor of transformers does.
    """

    def load(files: Files, device: torch.device, dtype: torch.dtype) -> Score:
        model, tokenizer = load_clip(files["model"], files["tokenizer"], device, dtype)
        encoder = ClipEncoder(model, tokenizer, partial(resize_and_crop, rounding="down"))
        divisor = NORMALIZER if config.normalize else 1.0

        def score(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
            raw = encoder.logit_scale * encoder.cosine(images, prompts)
            return RewardOutput(raw / divisor, {"raw": raw})

        return score

    return NetworkReward("pickscore", config, load)
