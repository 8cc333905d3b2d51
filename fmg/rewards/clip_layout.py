"""The names of CLIP weights in OpenCLIP's layout and in that of transformers, both ways.

OpenCLIP keeps query, key and value of an attention in one matrix and its two projections transposed; everything else
is a renaming. HPSv2's checkpoints are in OpenCLIP's layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fmg.core.errors import CheckpointError
from fmg.rewards.checkpoints import Tensors, some

LAYOUT = "open-clip-1"

VIT_H_14: Mapping[str, Any] = MappingProxyType(
    {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    }
)
"""OpenCLIP's description of ViT-H-14, the architecture of HPSv2 and PickScore (`model_cfg` of its JSON)."""

_SAME: Mapping[str, str] = MappingProxyType(
    {
        "logit_scale": "logit_scale",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        # transformers spells it so
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
)
_TRANSPOSED = MappingProxyType({"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"})
_IN_BLOCK = MappingProxyType(
    {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
)
_QKV = ("q_proj", "k_proj", "v_proj")
_TOWERS = MappingProxyType({"visual.": "vision_model", "": "text_model"})
_BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)$")
_HF_BLOCK = re.compile(r"^(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")


def from_open_clip(tensors: Tensors) -> dict[str, Tensor]:
    """The names of `transformers.CLIPModel` for a state dict of OpenCLIP; the causal mask is dropped.

    Raises:
        CheckpointError: naming the keys that a CLIP of two transformers does not have.
    """
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        if name == "attn_mask":
            continue
        if name in _SAME:
            renamed[_SAME[name]] = tensor
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.t()
        elif block := _block_from_open_clip(name, tensor):
            renamed.update(block)
        else:
            unknown.append(name)
    _refuse(unknown, "OpenCLIP")
    return renamed


def to_open_clip(tensors: Tensors) -> dict[str, Tensor]:
    """The inverse of `from_open_clip`; the `position_ids` that old versions of transformers stored are dropped.

    Raises:
        CheckpointError: naming the keys that `CLIPModel` does not have.
    """
    back = {new: (old, False) for old, new in _SAME.items()} | {new: (old, True) for old, new in _TRANSPOSED.items()}
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        if name.endswith("position_ids"):
            continue
        if name in back:
            old, transposed = back[name]
            renamed[old] = tensor.t() if transposed else tensor
        elif match := _HF_BLOCK.match(name):
            _block_to_open_clip(match, tensors, renamed, unknown)
        else:
            unknown.append(name)
    _refuse(unknown, "transformers")
    return renamed


def _block_from_open_clip(name: str, tensor: Tensor) -> dict[str, Tensor]:
    match = _BLOCK.match(name)
    if match is None:
        return {}
    tower, layer, module, kind = match[1] or "", match[2], match[3], match[4]
    prefix = f"{_TOWERS[tower]}.encoder.layers.{layer}"
    if module == "attn.in_proj":
        parts = tensor.chunk(3)
        return {f"{prefix}.self_attn.{x}.{kind}": part for x, part in zip(_QKV, parts, strict=True)}
    return {f"{prefix}.{_IN_BLOCK[module]}.{kind}": tensor} if module in _IN_BLOCK else {}


def _block_to_open_clip(match: re.Match[str], tensors: Tensors, renamed: dict[str, Tensor], unknown: list[str]) -> None:
    tower, layer, module, kind = match.groups()
    prefix = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{layer}"
    back = {new: old for old, new in _IN_BLOCK.items()}
    if module in back:
        renamed[f"{prefix}.{back[module]}.{kind}"] = tensors[match.string]
    elif module.removeprefix("self_attn.") in _QKV:
        stem = match.string.removesuffix(f"{module}.{kind}")
        parts = [tensors[f"{stem}self_attn.{x}.{kind}"] for x in _QKV]
        renamed[f"{prefix}.attn.in_proj_{kind}"] = torch.cat(parts)
    else:
        unknown.append(match.string)


def _refuse(unknown: list[str], layout: str) -> None:
    if unknown:
        raise CheckpointError(
            f"The checkpoint has keys that a CLIP in the layout of {layout} does not have: {some(unknown)}",
            "Give the published checkpoint of this reward.",
        )
