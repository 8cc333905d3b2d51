"""CLIPScore, in the four ways the name is used.

Hessel et al., CLIPScore, arXiv 2104.08718, section 3 (`hessel`); torchmetrics' `CLIPScore` for one image
(`torchmetrics`); the reward of DiffusionNFT and MeanFlowNFT (`diffusion-nft`); and the plain cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.types import RewardOutput
from fmg.registry import rewards
from fmg.rewards.clip_family import ClipEncoder, Preprocess, load_clip
from fmg.rewards.images import resize_and_crop, resize_and_crop_floats
from fmg.rewards.model_configs import ClipScoreConfig
from fmg.rewards.network import Files, NetworkReward, Score


@dataclass(frozen=True)
class Variant:
    """One published form.

    Attributes:
        preprocess: how images become squares.
        prefix: text put before the prompt.
        value: score from the cosine (b,) and `exp(logit_scale)`.
    """

    preprocess: Preprocess
    prefix: str
    value: Callable[[Float[Tensor, " b"], float], Float[Tensor, " b"]]


_AS_TRANSFORMERS = partial(resize_and_crop, rounding="down")

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "cosine": Variant(_AS_TRANSFORMERS, "", lambda cosine, _: cosine),
        "diffusion-nft": Variant(resize_and_crop_floats, "", lambda cosine, logit_scale: logit_scale * cosine / 100),
        "hessel": Variant(resize_and_crop, "A photo depicts ", lambda cosine, _: 2.5 * cosine.clamp(min=0)),
        "torchmetrics": Variant(_AS_TRANSFORMERS, "", lambda cosine, _: (100 * cosine).clamp(min=0)),
    }
)


@rewards.register("clipscore", ClipScoreConfig)
def clipscore(config: ClipScoreConfig) -> NetworkReward:
    """`scale` times the variant's score; part `cosine` is the plain cosine."""
    variant = VARIANTS[config.variant]

    def load(files: Files, device: torch.device, dtype: torch.dtype) -> Score:
        encoder = ClipEncoder(*load_clip(files["model"], files["tokenizer"], device, dtype), variant.preprocess)

        def score(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
            cosine = encoder.cosine(images, [variant.prefix + prompt for prompt in prompts])
            return RewardOutput(config.scale * variant.value(cosine, encoder.logit_scale), {"cosine": cosine})

        return score

    return NetworkReward("clipscore", config, load)
