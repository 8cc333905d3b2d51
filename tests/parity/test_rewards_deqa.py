"""DeQA-Score against figures of its authors' code (zhiyuanyou/DeQA-Score, revision 8e4abc8) under transformers 4.36.1.

That code does not run with newer versions, so its ratings of the same random weights and images are written down here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmg.core.errors import CheckpointError
from fmg.registry import rewards
from fmg.rewards.base import checked
from tests.support.cli import fmg
from tests.tiny_rewards import write_deqa

RATINGS = {
    (64, 64): [2.601244, 3.276286, 2.613037],
    (30, 75): [3.488648, 2.981052, 2.843356],
    (80, 41): [3.670157, 3.559095, 2.602331],
}


def images(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(width))


def test_ratings_of_the_authors_code(tmp_path: Path) -> None:
    folder = write_deqa(tmp_path).folder
    reward = checked("deqa", rewards.build("deqa", {"weights": str(folder), "dtype": "fp32", "batch_size": 2}))
    for (height, width), expected in RATINGS.items():
        output = reward(images(height, width), ["any", "", "prompt"])
        torch.testing.assert_close(output.parts["rating"], torch.tensor(expected), rtol=0, atol=1e-5)
        torch.testing.assert_close(output.total, output.parts["rating"] / 5)


def test_half_precision_and_single_images(tmp_path: Path) -> None:
    folder = write_deqa(tmp_path).folder
    reward = rewards.build("deqa", {"weights": str(folder), "dtype": "bf16"})
    shown = images(64, 64)
    alone = torch.cat([reward(image[None], [""]).parts["rating"] for image in shown])
    torch.testing.assert_close(alone, torch.tensor(RATINGS[64, 64]), rtol=0, atol=0.1)


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    tiny = write_deqa(tmp_path)

    def build() -> None:
        rewards.build("deqa", {"weights": str(tiny.folder)})(images(64, 64)[:1], [""])

    shard = tiny.folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("k_proj.multiway.1.weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, shard)
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        build()
    # positions that older versions of transformers stored are computed, not read
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(1)}, shard)
    build()
    config = tiny.folder / "config.json"
    stated = json.loads(config.read_text())
    for key, value, message in (
        ("model_type", "llama", "does not contain an mPLUG-Owl2"),
        ("visual_config", None, "does not contain an mPLUG-Owl2"),
        ("vocab_size", 100, "does not contain a LLaMA 2 with its vocabulary"),
    ):
        config.write_text(json.dumps({**stated, key: value}))
        with pytest.raises(CheckpointError, match=message):
            build()


def test_the_rules_of_rewards_hold(tmp_path: Path) -> None:
    done = fmg("check-component", "reward", "deqa", "--set", f"weights={write_deqa(tmp_path).folder}")
    assert done.code == 0, done.stdout
