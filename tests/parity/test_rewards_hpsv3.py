"""HPSv3 against the forward of its authors' model class, on the names that transformers 4.45 gave the weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fmg.registry import rewards
from fmg.rewards.hpsv3 import PIXELS
from tests.tiny_rewards import Tiny, qwen_tokenizer, write_hpsv3

PROMPTS = ["a red cat", "", "ein Bär {mit} “Hut” 🦊 " * 5]


def reference(tiny: Tiny, images: Tensor, prompts: list[str]) -> Tensor:
    """`[mu, log sigma]`: the vision tower, its output in place of the image tokens, the language model, the head."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    reward_id = tokenizer.convert_tokens_to_ids("<|Reward|>")
    config = Qwen2VLConfig(**json.loads((tiny.folder / "base" / "config.json").read_text()))
    model = Qwen2VLForConditionalGeneration(config)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    renamed = {
        name.replace("visual.", "model.visual.")
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1)
        if name.startswith("model.")
        else name: x
        for name, x in tiny.tensors.items()
        if not name.startswith("rm_head.")
    }
    model.load_state_dict(renamed, strict=True)
    model.eval()
    pictures = [picture(image) for image in images]
    inputs = Qwen2VLImageProcessorPil()(images=pictures, return_tensors="pt")
    rows = [chat(prompt, int(grid.prod()) // 4) for prompt, grid in zip(prompts, inputs.image_grid_thw, strict=True)]
    batch = tokenizer(rows, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(batch.input_ids)
        seen = model.model.visual(inputs.pixel_values, grid_thw=inputs.image_grid_thw).pooler_output
        slots = (batch.input_ids == config.image_token_id).unsqueeze(-1).expand_as(embeddings)
        states = model.model.language_model(
            inputs_embeds=embeddings.masked_scatter(slots, seen), attention_mask=batch.attention_mask
        ).last_hidden_state
        return head(tiny)(states[batch.input_ids == reward_id])


def head(tiny: Tiny) -> nn.Module:
    sizes = [tiny.tensors[f"rm_head.{i}.weight"].shape for i in (0, 3, 5)]
    first, second, third = (nn.Linear(fan_in, fan_out) for fan_out, fan_in in sizes)
    network = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.05), second, nn.ReLU(), third)
    network.load_state_dict({n.removeprefix("rm_head."): x for n, x in tiny.tensors.items() if n.startswith("rm_head")})
    return network.eval()


def picture(image: Tensor) -> Image.Image:
    """The resize of qwen-vl-utils with min_pixels = max_pixels."""
    height, width = image.shape[-2:]
    rows, columns = max(28, round(height / 28) * 28), max(28, round(width / 28) * 28)
    if rows * columns > PIXELS:
        beta = math.sqrt((height * width) / PIXELS)
        rows, columns = (math.floor(n / beta / 28) * 28 for n in (height, width))
    elif rows * columns < PIXELS:
        beta = math.sqrt(PIXELS / (height * width))
        rows, columns = (math.ceil(n * beta / 28) * 28 for n in (height, width))
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((columns, rows), Image.Resampling.BICUBIC)


def chat(prompt: str, slots: int) -> str:
    instruction = f"\nRate it.\nTextual prompt - {prompt}\n" + "\nRatings: <|Reward|>\n\nEND\n"
    image = "<|vision_start|>" + "<|image_pad|>" * slots + "<|vision_end|>"
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        + image
        + instruction
        + "<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(("height", "width"), [(64, 64), (30, 75)])
def test_hpsv3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, height: int, width: int) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    tiny = write_hpsv3(tmp_path / "hpsv3")
    reward = rewards.build(
        "hpsv3",
        {
            "weights": str(tiny.file),
            "base": str(tiny.folder / "base"),
            "instruction": str(tiny.folder / "instruction.py"),
            "dtype": "fp32",
            "batch_size": 2,
        },
    )
    images = torch.rand(len(PROMPTS), 3, height, width, generator=torch.Generator().manual_seed(width))
    expected = reference(tiny, images, PROMPTS)
    assert expected[:, 0].std() > 1e-3
    output = reward(images, PROMPTS)
    torch.testing.assert_close(output.total, expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.parts["log_sigma"], expected[:, 1], rtol=0, atol=1e-5)
