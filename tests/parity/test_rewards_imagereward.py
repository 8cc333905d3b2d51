"""ImageReward against its authors' formula, written out on the state dict of their checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fmg.registry import rewards
from fmg.rewards.images import CLIP_MEAN, CLIP_STD
from tests.tiny_rewards import BERT_HEADS, BLIP_WIDTH, LAYERS, SIDE, Tensors, bert_tokenizer, write_image_reward

PROMPTS = ["a red cat", "", "word " * 60, "a hat, a fox."]


def reference(weights: Tensors, images: Tensor, prompts: list[str]) -> Tensor:
    features = bert(weights, prompts, vit(weights, preprocess(images)))[:, 0]
    for layer in (0, 2, 4, 6, 7):
        features = linear(weights, f"mlp.layers.{layer}", features)
    return ((features - 0.16717362830052426) / 1.0333394966054072).squeeze(1)


def preprocess(images: Tensor) -> Tensor:
    """`Resize(SIDE, BICUBIC)` and `CenterCrop(SIDE)` of torchvision on PIL images, one at a time."""
    height, width = images.shape[-2:]
    longer = int(SIDE * max(height, width) / min(height, width))
    columns, rows = (longer, SIDE) if height <= width else (SIDE, longer)
    top, left = round((rows - SIDE) / 2.0), round((columns - SIDE) / 2.0)
    squares = []
    for image in images:
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        picture = Image.fromarray(np.ascontiguousarray(pixels)).resize((columns, rows), Image.Resampling.BICUBIC)
        crop = np.asarray(picture.crop((left, top, left + SIDE, top + SIDE)))
        squares.append(torch.from_numpy(crop.copy()).permute(2, 0, 1).float().div(255))
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return (torch.stack(squares) - mean) / std


def vit(weights: Tensors, x: Tensor) -> Tensor:
    root = "blip.visual_encoder"
    x = F.conv2d(x, *pair(weights, f"{root}.patch_embed.proj"), stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([weights[f"{root}.cls_token"].expand(len(x), -1, -1), x], dim=1) + weights[f"{root}.pos_embed"]
    for layer in range(LAYERS):
        block = f"{root}.blocks.{layer}"
        qkv = linear(weights, f"{block}.attn.qkv", norm(weights, f"{block}.norm1", x, 1e-6))
        q, k, v = qkv.reshape(*x.shape[:2], 3, BLIP_WIDTH // 64, 64).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(-2, -1)) * 64**-0.5).softmax(-1) @ v
        x = x + linear(weights, f"{block}.attn.proj", mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(weights, f"{block}.mlp.fc1", norm(weights, f"{block}.norm2", x, 1e-6)))
        x = x + linear(weights, f"{block}.mlp.fc2", hidden)
    return norm(weights, f"{root}.norm", x, 1e-6)


def bert(weights: Tensors, prompts: list[str], patches: Tensor) -> Tensor:
    tokens = bert_tokenizer()(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    root = "blip.text_encoder"
    x = weights[f"{root}.embeddings.word_embeddings.weight"][tokens.input_ids]
    x = x + weights[f"{root}.embeddings.position_embeddings.weight"][:35]
    x = norm(weights, f"{root}.embeddings.LayerNorm", x, 1e-12)
    mask = (1.0 - tokens.attention_mask[:, None, None, :].float()) * -10000.0
    for layer in range(LAYERS):
        block = f"{root}.encoder.layer.{layer}"
        x = attend(weights, f"{block}.attention", x, x, mask)
        x = attend(weights, f"{block}.crossattention", x, patches, torch.zeros(()))
        hidden = F.gelu(linear(weights, f"{block}.intermediate.dense", x))
        x = norm(weights, f"{block}.output.LayerNorm", x + linear(weights, f"{block}.output.dense", hidden), 1e-12)
    return x


def attend(weights: Tensors, name: str, x: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    def heads(kind: str, y: Tensor) -> Tensor:
        return linear(weights, f"{name}.self.{kind}", y).unflatten(-1, (BERT_HEADS, -1)).transpose(1, 2)

    q, k, v = heads("query", x), heads("key", source), heads("value", source)
    mixed = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v
    out = linear(weights, f"{name}.output.dense", mixed.transpose(1, 2).flatten(2))
    return norm(weights, f"{name}.output.LayerNorm", x + out, 1e-12)


def pair(weights: Tensors, name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def linear(weights: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, *pair(weights, name))


def norm(weights: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *pair(weights, name), eps=eps)


@pytest.mark.parametrize("given", ["folder", "file"])
def test_imagereward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    tiny = write_image_reward(tmp_path / "reward")
    weights = tiny.folder if given == "folder" else tiny.file
    options = {"weights": str(weights), "tokenizer": str(tiny.folder / "tokenizer"), "vision_heads": 2, "batch_size": 3}
    reward = rewards.build("imagereward", options)
    # the last becomes 32 x 35, whose crop is at 2 when rounded half to even, and at 1 when rounded down
    for height, width in ((64, 64), (20, 35), (64, 70)):
        images = torch.rand(len(PROMPTS), 3, height, width, generator=torch.Generator().manual_seed(width))
        expected = reference(tiny.tensors, images, PROMPTS)
        assert expected.std() > 0.01
        torch.testing.assert_close(reward(images, PROMPTS).total, expected, rtol=0, atol=1e-5)


def test_images_are_scored_against_their_own_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    tiny = write_image_reward(tmp_path / "reward")
    reward = rewards.build(
        "imagereward", {"weights": str(tiny.folder), "tokenizer": str(tiny.folder / "tokenizer"), "vision_heads": 2}
    )
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together = reward(images, PROMPTS).total
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]).total for i in range(4)])
    swapped = reward(images, PROMPTS[::-1]).total
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (together - swapped).abs().max() > 1e-3
