"""The inverses of the renamings with which rewards read published checkpoints."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fmg.rewards.clip import IN_BLOCK, QKV, SAME, TRANSPOSED
from fmg.rewards.imagereward import PARTS, VISION_NAMES, translate
from fmg.rewards.network import Tensors

_HF_BLOCK = re.compile(r"^(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")


def to_open_clip(tensors: Tensors) -> dict[str, Tensor]:
    """The inverse of `from_open_clip`; the `position_ids` that old versions of transformers stored are dropped."""
    back = {new: (old, False) for old, new in SAME.items()} | {new: (old, True) for old, new in TRANSPOSED.items()}
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
    assert not unknown, unknown
    return renamed


def _block_to_open_clip(match: re.Match[str], tensors: Tensors, renamed: dict[str, Tensor], unknown: list[str]) -> None:
    tower, layer, module, kind = match.groups()
    prefix = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{layer}"
    back = {new: old for old, new in IN_BLOCK.items()}
    if module in back:
        renamed[f"{prefix}.{back[module]}.{kind}"] = tensors[match.string]
    elif module.removeprefix("self_attn.") in QKV:
        stem = match.string.removesuffix(f"{module}.{kind}")
        parts = [tensors[f"{stem}self_attn.{x}.{kind}"] for x in QKV]
        renamed[f"{prefix}.attn.in_proj_{kind}"] = torch.cat(parts)
    else:
        unknown.append(match.string)


def to_hpsv3(tensors: Tensors) -> dict[str, Tensor]:
    """The inverse of `from_hpsv3`."""
    parts = {"base.visual.": "visual.", "base.language_model.": "model.", "head.": "rm_head."}
    return {
        next(parts[part] + name.removeprefix(part) for part in parts if name.startswith(part)): tensor
        for name, tensor in tensors.items()
    }


def to_image_reward(tensors: Tensors) -> dict[str, Tensor]:
    """The inverse of `from_image_reward`."""
    parts, vision = ({new: old for old, new in table.items()} for table in (PARTS, VISION_NAMES))
    renamed = {}
    for name, tensor in tensors.items():
        part = next(part for part in parts if name.startswith(part))
        rest = name.removeprefix(part)
        renamed[parts[part] + (translate(rest, vision) if part == "vision." else rest)] = tensor
    return renamed
