"""HPSv2, PickScore, CLIPScore and the aesthetic score against their authors' formulas, from their own file layouts."""

from __future__ import annotations

import html
import math
from pathlib import Path

import ftfy
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fmg.registry import rewards
from fmg.rewards.images import CLIP_MEAN, CLIP_STD
from tests.tiny_rewards import (
    CLIP_HEADS,
    CONTEXT,
    LAYERS,
    SIDE,
    Tensors,
    clip_tokenizer,
    write_aesthetic_head,
    write_clip_folder,
    write_clip_tokenizer,
    write_open_clip,
)

PROMPTS = ["A Red Cat", "an “old”   fox &amp;amp; hat", "", "naïve 🦊 café", "word " * 100]
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))


def pictures(height: int, width: int, count: int = len(PROMPTS)) -> Tensor:
    """Smooth random images with 8-bit levels, as read from files."""
    generator = torch.Generator().manual_seed(height * width)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return (smooth * 255).round() / 255


# HPSv2: OpenCLIP's module written out on its own state dict


def reference_hpsv2(weights: Tensors, images: Tensor, prompts: list[str]) -> Tensor:
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    scale = SIDE / max(images.shape[-2:])
    height, width = round(images.shape[-2] * scale), round(images.shape[-1] * scale)
    resized = F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
    down, across = SIDE - height, SIDE - width
    padded = F.pad(resized, (across // 2, across - across // 2, down // 2, down - down // 2))
    image = F.normalize(open_clip_image(weights, (padded - mean) / std), dim=-1)
    text = F.normalize(open_clip_text(weights, open_clip_tokens(prompts)), dim=-1)
    return torch.diagonal(image @ text.T)


def open_clip_tokens(prompts: list[str]) -> Tensor:
    """OpenCLIP pads with zeros, and in a truncated text replaces the last token by the end of text."""
    tokenizer = clip_tokenizer()
    ids = torch.zeros(len(prompts), CONTEXT, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
        tokens = tokenizer(" ".join(text.split()).lower()).input_ids
        if len(tokens) > CONTEXT:
            tokens = tokens[:CONTEXT]
            tokens[-1] = tokenizer.eos_token_id
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids


def open_clip_image(weights: Tensors, x: Tensor) -> Tensor:
    x = F.conv2d(x, weights["visual.conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([weights["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = norm(weights, "visual.ln_pre", x + weights["visual.positional_embedding"])
    x = open_clip_blocks(weights, "visual.transformer", x, mask=None)
    return norm(weights, "visual.ln_post", x[:, 0]) @ weights["visual.proj"]


def open_clip_text(weights: Tensors, ids: Tensor) -> Tensor:
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
    x = open_clip_blocks(weights, "transformer", x, mask=torch.full((CONTEXT, CONTEXT), -math.inf).triu(1))
    x = norm(weights, "ln_final", x)
    return x[torch.arange(len(x)), ids.argmax(-1)] @ weights["text_projection"]


def open_clip_blocks(weights: Tensors, prefix: str, x: Tensor, mask: Tensor | None) -> Tensor:
    for layer in range(LAYERS):
        block = f"{prefix}.resblocks.{layer}"
        attention = nn.MultiheadAttention(x.shape[-1], CLIP_HEADS, batch_first=True)
        attention.load_state_dict(
            {name: weights[f"{block}.attn.{name}"] for name in attention.state_dict()}, strict=True
        )
        y = norm(weights, f"{block}.ln_1", x)
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = F.linear(norm(weights, f"{block}.ln_2", x), *pair(weights, f"{block}.mlp.c_fc"))
        x = x + F.linear(F.gelu(y), *pair(weights, f"{block}.mlp.c_proj"))
    return x


def pair(weights: Tensors, name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def norm(weights: Tensors, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *pair(weights, name))


@pytest.mark.parametrize("version", ["v2.1", "v2.0"])
def test_hpsv2(tmp_path: Path, version: str) -> None:
    tiny = write_open_clip(tmp_path / "hps")
    if version == "v2.0":
        tiny.file.rename(tiny.folder / "HPS_v2_compressed.pt")
    tokenizer = write_clip_tokenizer(tmp_path / "tokenizer")
    reward = rewards.build(
        "hpsv2", {"weights": str(tiny.folder), "tokenizer": str(tokenizer), "version": version, "batch_size": 2}
    )
    for height, width in ((64, 64), (24, 24), (45, 91), (100, 37), (SIDE, SIDE)):
        images = pictures(height, width)
        with torch.no_grad():
            expected = reference_hpsv2(tiny.tensors, images, PROMPTS)
        assert expected.std() > 0.01
        torch.testing.assert_close(reward(images, PROMPTS).total, expected, **TOLERANCE)


def test_hpsv2_takes_a_transformers_folder(tmp_path: Path) -> None:
    folder = write_clip_folder(tmp_path / "clip")
    reward = rewards.build("hpsv2", {"weights": str(folder), "tokenizer": str(folder)})
    cosine = rewards.build("clipscore", {"weights": str(folder)})
    images = pictures(SIDE, SIDE, 1)
    torch.testing.assert_close(reward(images, ["cat"]).total, cosine(images, ["cat"]).total, **TOLERANCE)


# The others: transformers' own model and image processor, as their authors call them


def transformers_cosine(folder: Path, images: Tensor, prompts: list[str]) -> tuple[Tensor, float]:
    model = CLIPModel.from_pretrained(str(folder))
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    tokens = clip_tokenizer()(prompts, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=processor(images=to_pil(images), return_tensors="pt").pixel_values, **tokens)
        return (output.image_embeds * output.text_embeds).sum(-1), float(model.logit_scale.exp())


def to_pil(images: Tensor) -> list[Image.Image]:
    levels = (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(x)) for x in levels]


def test_pickscore(tmp_path: Path) -> None:
    folder = write_clip_folder(tmp_path / "clip")
    options = {"weights": str(folder), "tokenizer": str(folder)}
    reward = rewards.build("pickscore", options)
    as_published = rewards.build("pickscore", {**options, "normalize": False})
    # the last becomes 32 x 35, whose crop is at 1 when rounded down, and at 2 when rounded half to even
    for height, width in ((64, 64), (20, 35), (91, 45), (64, 70)):
        images = pictures(height, width)
        cosine, scale = transformers_cosine(folder, images, PROMPTS)
        normalized = reward(images, PROMPTS)
        torch.testing.assert_close(normalized.total, scale * cosine / 26, **TOLERANCE)
        torch.testing.assert_close(normalized.parts["raw"], scale * cosine, **TOLERANCE)
        torch.testing.assert_close(as_published(images, PROMPTS).total, scale * cosine, **TOLERANCE)


def test_clipscore_cosine_and_torchmetrics(tmp_path: Path) -> None:
    folder = write_clip_folder(tmp_path / "clip")
    images = pictures(40, 64)
    cosine, _ = transformers_cosine(folder, images, PROMPTS)
    plain = rewards.build("clipscore", {"weights": str(folder), "scale": -2.0})
    metric = rewards.build("clipscore", {"weights": str(folder), "variant": "torchmetrics"})
    torch.testing.assert_close(plain(images, PROMPTS).total, -2 * cosine, **TOLERANCE)
    torch.testing.assert_close(metric(images, PROMPTS).total, (100 * cosine).clamp(min=0), rtol=0, atol=1e-4)


def test_clipscore_hessel_reads_a_prefixed_prompt(tmp_path: Path) -> None:
    folder = write_clip_folder(tmp_path / "clip", seed=3)
    images = pictures(64, 48)
    cosine, _ = transformers_cosine(folder, images, [f"A photo depicts {prompt}" for prompt in PROMPTS])
    output = rewards.build("clipscore", {"weights": str(folder), "variant": "hessel"})(images, PROMPTS)
    torch.testing.assert_close(output.total, 2.5 * cosine.clamp(min=0), **TOLERANCE)
    torch.testing.assert_close(output.parts["cosine"], cosine, **TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(64, 70), (20, 27)])
def test_clipscore_of_diffusion_nft_resizes_floats(tmp_path: Path, height: int, width: int) -> None:
    folder = write_clip_folder(tmp_path / "clip")
    images = pictures(height, width) * 0.999
    model = CLIPModel.from_pretrained(str(folder))
    longer = int(SIDE * max(height, width) / min(height, width))
    size = (SIDE, longer) if height <= width else (longer, SIDE)
    resized = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (round((n - SIDE) / 2) for n in size)
    crop = resized[..., top : top + SIDE, left : left + SIDE]
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    tokens = clip_tokenizer()(PROMPTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=(crop - mean) / std, **tokens).logits_per_image.diagonal() / 100
    reward = rewards.build("clipscore", {"weights": str(folder), "variant": "diffusion-nft"})
    torch.testing.assert_close(reward(images, PROMPTS).total, expected, **TOLERANCE)


def test_aesthetic(tmp_path: Path) -> None:
    folder, head = write_clip_folder(tmp_path / "clip"), write_aesthetic_head(tmp_path / "head")
    images = pictures(64, 64)
    layers = [nn.Linear(*reversed(head.tensors[f"layers.{i}.weight"].shape)) for i in (0, 2, 4, 6, 7)]
    dropouts = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
    mlp = nn.Sequential(
        layers[0], dropouts[0], layers[1], dropouts[1], layers[2], dropouts[2], layers[3], layers[4]
    ).eval()
    mlp.load_state_dict({name.removeprefix("layers."): x for name, x in head.tensors.items()})
    model = CLIPModel.from_pretrained(str(folder))
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels = processor(images=to_pil(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        embeddings = model.get_image_features(pixel_values=pixels).pooler_output
        expected = mlp(embeddings / embeddings.norm(dim=-1, keepdim=True)).squeeze(1)
    assert expected.std() > 1e-3
    reward = rewards.build("aesthetic", {"weights": str(folder), "head": str(head.file)})
    torch.testing.assert_close(reward(images, PROMPTS).total, expected, **TOLERANCE)
