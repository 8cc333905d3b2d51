"""ImageReward (Xu et al., arXiv 2304.05977): a BLIP text encoder that attends to the image, and an affine head."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from fmg.core.errors import CheckpointError
from fmg.core.types import RewardOutput
from fmg.rewards.configs import ImageRewardConfig
from fmg.rewards.images import normalize, resize_and_crop
from fmg.rewards.network import (
    Files,
    NetworkReward,
    Score,
    Tensors,
    affine_head,
    check_entries,
    load_module,
    load_pretrained,
    read_json,
    read_renamed,
    under,
    with_prefixes,
)

LAYOUT = "image-reward-1"
MEAN = 0.16717362830052426
STD = 1.0333394966054072
"""Mean and standard deviation of the raw score on the authors' data (`ImageReward.py` of their repository)."""

MAX_TOKENS = 35
HEADS: Mapping[int, int] = MappingProxyType({768: 12, 1024: 16})
"""Attention heads of BLIP's published image encoders, by width."""

VISION_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "blocks": "encoder.layers",
        "attn.qkv": "self_attn.qkv",
        "attn.proj": "self_attn.projection",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "norm": "post_layernorm",
    }
)
"""Names in the authors' image encoder and in `BlipVisionModel`; everything else has the same name in both."""

PARTS: Mapping[str, str] = MappingProxyType(
    {"blip.visual_encoder.": "vision.", "blip.text_encoder.": "text.", "mlp.": "head."}
)


def from_image_reward(tensors: Tensors) -> dict[str, Tensor]:
    """The names `vision.*` of `BlipVisionModel`, `text.*` of `BlipTextModel` and `head.*`.

    The projections of BLIP's contrastive loss, which the score does not use, and `position_ids` are dropped.

    Raises:
        CheckpointError: naming unexpected keys.
    """
    renamed = with_prefixes(tensors, PARTS, ("blip.vision_proj.", "blip.text_proj."), "ImageReward.pt")
    return {
        translate(name, VISION_NAMES) if name.startswith("vision.") else name: tensor
        for name, tensor in renamed.items()
        if not name.endswith("position_ids")
    }


def imagereward(config: ImageRewardConfig) -> NetworkReward:
    """`(head(h_CLS) - MEAN) / STD`, with `h_CLS` of the text encoder that attends to the image.

    Each image is scored against its own prompt, of which the first 35 tokens are read. Images are rounded to 8 bits,
    resized by Pillow and cropped as torchvision does.
    """
    return NetworkReward("imagereward", config, partial(_load, config.vision_heads))


class Blip:
    """The state at the first token of a prompt that attends to an image.

    Args:
        vision: a `BlipVisionModel`.
        text: a `BlipTextModel` with cross-attention.
        tokenizer: the tokenizer of bert-base-uncased.
    """

    def __init__(self, vision: Any, text: Any, tokenizer: Any) -> None:
        self._vision = vision
        self._text = text
        self._tokenizer = tokenizer

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, "b d"]:
        squares = normalize(resize_and_crop(images, self._vision.config.image_size))
        patches = self._vision(pixel_values=squares.to(self._vision.device, self._vision.dtype)).last_hidden_state
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self._text.device)
        states = self._text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=patches.new_ones(patches.shape[:2], dtype=torch.long),
            # the config builds the cross-attention with is_decoder; the call must not make the text causal
            is_decoder=False,
        ).last_hidden_state
        first: Tensor = states[:, 0].float()
        return first


def _load(heads: int | None, files: Files, device: torch.device, dtype: torch.dtype) -> Score:
    checkpoint, tokenizer = files["checkpoint"], files["tokenizer"]
    tensors = read_renamed(checkpoint.path, LAYOUT, from_image_reward)
    vision, text, head = (under(name, tensors) for name in ("vision.", "text.", "head."))
    image_config = _vision_config(vision, heads)
    text_config = _text_config(read_json(checkpoint.files["med_config.json"]), image_config.hidden_size)
    loaded = load_pretrained(BertTokenizer.from_pretrained, tokenizer.folder, tokenizer.asset.what)
    # the model never uses them, but a prompt that contains their text must not be split
    loaded.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    blip = Blip(
        load_module(BlipVisionModel, image_config, vision, checkpoint.path, device, dtype),
        load_module(BlipTextModel, text_config, text, checkpoint.path, device, dtype, {"add_pooling_layer": False}),
        loaded,
    )
    check_entries(loaded, tokenizer.folder, text_config.vocab_size, "Set tokenizer to that of bert-base-uncased.")
    affine = affine_head(head)
    return lambda images, prompts: RewardOutput((affine(blip(images, prompts)) - MEAN) / STD, {})


def _vision_config(tensors: Tensors, heads: int | None) -> Any:
    """The architecture that the tensors of a `BlipVisionModel` have.

    Args:
        tensors: tensors by name.
        heads: attention heads; None for a published size.

    Raises:
        CheckpointError: a tensor is missing, or the width does not fit that number of heads.
    """
    try:
        patches = tensors["embeddings.patch_embedding.weight"]
        positions = tensors["embeddings.position_embedding"].shape[1]
        layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}
        feedforward = tensors["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"The ImageReward checkpoint lacks {error}", "Use the published file.") from None
    width, side = patches.shape[0], patches.shape[-1]
    heads = heads or HEADS.get(width)
    if heads is None:
        raise CheckpointError(
            f"The image encoder of the ImageReward checkpoint is {width} wide, which is not a published size, and the"
            " weights do not show the number of its attention heads",
            "Use the published file, or state it in the option vision_heads.",
        )
    if width % heads:
        raise CheckpointError(
            f"The image encoder of the ImageReward checkpoint is {width} wide, which is not divisible by {heads} heads",
            "Correct the option vision_heads.",
        )
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=feedforward,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        image_size=side * round((positions - 1) ** 0.5),
        patch_size=side,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(bert: Mapping[str, Any], image_width: int) -> Any:
    """The authors' `med_config.json` as a config of `BlipTextModel`."""
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
        "pad_token_id",
    )
    try:
        return BlipTextConfig(
            **{name: bert[name] for name in same}, encoder_hidden_size=image_width, is_decoder=True, use_cache=False
        )
    except KeyError as error:
        raise CheckpointError(f"med_config.json lacks {error}", "Use the published file.") from None


def translate(name: str, table: Mapping[str, str]) -> str:
    """Replaces whole dotted parts of a name, the longest known part first."""
    known = "|".join(re.escape(part) for part in sorted(table, key=len, reverse=True))
    return re.sub(rf"(?<![^.])({known})(?![^.])", lambda match: table[match[1]], name)
