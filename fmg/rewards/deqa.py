"""DeQA-Score (You et al., arXiv 2501.11561): the expected rating of an image's quality, whatever its prompt.

An mPLUG-Owl2 completes "The quality of the image is" with one of five words. The score is the mean of their ratings
under the probabilities of the words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaConfig

from fmg.core.errors import CheckpointError
from fmg.core.model_folder import read_config, weight_files, whole
from fmg.core.types import RewardOutput
from fmg.rewards.configs import DeqaConfig
from fmg.rewards.images import CLIP_MEAN, check_drawable, normalize, resize_and_crop
from fmg.rewards.mplug_owl2 import MplugOwl2, number
from fmg.rewards.network import Files, NetworkReward, Score, load_plain_module, read_tensors

# Tokens of LLaMA for the two texts around the image, with the token that starts a text and the space that LLaMA's
# tokenizer puts before each of them.
# "USER: How would you rate the quality of this image?\n"
BEFORE = (1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13)
# "\nASSISTANT: The quality of the image is"
AFTER = (29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338)
# excellent, good, fair, poor, bad
WORDS = (15129, 1781, 6534, 6460, 4319)
RATINGS = (5.0, 4.0, 3.0, 2.0, 1.0)
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_BACKGROUND = tuple(int(level * 255) / 255 for level in CLIP_MEAN)


def deqa(config: DeqaConfig) -> NetworkReward:
    """The expected rating divided by 5, from 0.2 to 1; part `rating`, from 1 to 5. Does not see the prompt.

    An oblong image is padded to a square in CLIP's mean colour. Pillow's bicubic filter resizes it on 8-bit pixels.
    """
    return NetworkReward("deqa", config, _load)


def squares(images: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b 3 side side"]:
    """Images as the vision tower reads them."""
    check_drawable(images)
    height, width = images.shape[-2:]
    longer = max(height, width)
    canvas = images.new_tensor(_BACKGROUND).view(1, 3, 1, 1).repeat(len(images), 1, longer, longer)
    top, left = (longer - height) // 2, (longer - width) // 2
    canvas[:, :, top : top + height, left : left + width] = images
    return normalize(resize_and_crop(canvas, side))


def _load(files: Files, device: torch.device, dtype: torch.dtype) -> Score:
    folder = files["weights"].folder
    config = read_config(folder)
    visual = config.get("visual_config")
    vision, abstractor = (
        (visual.get("visual_model"), visual.get("visual_abstractor")) if isinstance(visual, dict) else (None, None)
    )
    if config.get("model_type") != "mplug_owl2" or not isinstance(vision, dict) or not isinstance(abstractor, dict):
        raise CheckpointError(
            f"{folder} does not contain an mPLUG-Owl2 with its visual_config", "Give a folder of DeQA-Score."
        )
    language = _language(config, folder)
    module: MplugOwl2 = load_plain_module(
        lambda: MplugOwl2(language, vision, abstractor), _tensors(folder), folder, device, dtype
    )
    side = whole(vision, "image_size")
    before, after = torch.tensor(BEFORE, device=device), torch.tensor(AFTER, device=device)
    ratings = torch.tensor(RATINGS, device=device)

    def score(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        logits = module(before, squares(images, side).to(device, dtype), after)[:, list(WORDS)]
        rating = logits.float().softmax(-1) @ ratings
        return RewardOutput(rating / RATINGS[0], {"rating": rating})

    return score


def _language(config: Mapping[str, object], folder: Path) -> LlamaConfig:
    """The config of the language model.

    Raises:
        CheckpointError: a size is missing, or it is not LLaMA 2.
    """
    if whole(config, "vocab_size") <= max(*BEFORE, *AFTER, *WORDS) or config.get("rope_scaling") is not None:
        raise CheckpointError(
            f"{folder} does not contain a LLaMA 2 with its vocabulary", "Give a folder of DeQA-Score."
        )
    cls: Any = LlamaConfig
    made: LlamaConfig = cls(
        **{name: whole(config, name) for name in _SIZES},
        rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": number(config, "rope_theta", 10_000.0)},
    )
    return made


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder except those that can be computed."""
    found = {name: tensor for file in weight_files(folder) for name, tensor in read_tensors(file).items()}
    return {name: tensor for name, tensor in found.items() if not name.endswith("rotary_emb.inv_freq")}
