"""HPSv2 and HPSv2.1 (Wu et al., Human Preference Score v2, arXiv 2306.09341)."""

from __future__ import annotations

import torch

from fmg.core.types import RewardOutput
from fmg.registry import rewards
from fmg.rewards.clip_family import ClipEncoder, load_clip
from fmg.rewards.clip_text import clean, require_ftfy
from fmg.rewards.images import resize_and_pad
from fmg.rewards.model_configs import Hpsv2Config
from fmg.rewards.network import Files, NetworkReward, Score


@rewards.register("hpsv2", Hpsv2Config)
def hpsv2(config: Hpsv2Config) -> NetworkReward:
    """`cos(image, prompt)`, raw; the published benchmark prints it times 100.

    Images are not rounded to 8 bits; see `resize_and_pad` for the resize, and `clean` for the text. The authors run
    it under fp16 autocast on a GPU, which moves a score in the fourth digit; here it is fp32 unless `dtype` says else.

    Raises:
        MissingDependencyError: without the package ftfy.
    """
    require_ftfy("hpsv2")
    return NetworkReward("hpsv2", config, _load)


def _load(files: Files, device: torch.device, dtype: torch.dtype) -> Score:
    model, tokenizer = load_clip(files["checkpoint"], files["tokenizer"], device, dtype)
    encoder = ClipEncoder(model, tokenizer, resize_and_pad, clean)
    return lambda images, prompts: RewardOutput(encoder.cosine(images, prompts), {})
