"""The names of ImageReward's weights, in both directions, and checkpoints of other models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from fmg.core.errors import CheckpointError
from fmg.registry import rewards
from fmg.rewards.imagereward import from_image_reward
from tests.support.reward_layouts import to_image_reward
from tests.tiny_rewards import image_reward_shapes, random_tensors, write_image_reward

UNUSED = ("blip.vision_proj.", "blip.text_proj.")


def test_both_ways_give_back_every_tensor_that_counts() -> None:
    tensors = {name: x for name, x in random_tensors(image_reward_shapes()).items() if not name.startswith(UNUSED)}
    back = to_image_reward(from_image_reward(tensors))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_full_size_names_are_those_of_transformers() -> None:
    vision = BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224
    )
    text = BlipTextConfig(encoder_hidden_size=1024, is_decoder=True, num_attention_heads=12)
    with torch.device("meta"):
        parts = {"vision": BlipVisionModel(vision), "text": BlipTextModel(text, add_pooling_layer=False)}
    ours = {f"{part}.{name}": x for part, model in parts.items() for name, x in model.state_dict().items()}
    ours = {name: x for name, x in ours.items() if not name.endswith("position_ids")}
    published = to_image_reward(ours)
    assert published["blip.visual_encoder.blocks.23.attn.qkv.weight"].shape == (3072, 1024)
    assert published["blip.visual_encoder.norm.bias"].shape == (1024,)
    assert published["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"].shape == (768, 1024)
    assert published["blip.text_encoder.embeddings.word_embeddings.weight"].shape == (30524, 768)
    assert from_image_reward(published).keys() == ours.keys()


def test_foreign_keys_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"blip\.text_decoder\.x"):
        from_image_reward({"blip.text_decoder.x": torch.zeros(1)})


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("blip.visual_encoder.pos_embed", "position_embedding"),
        ("blip.visual_encoder.blocks.1.norm2.bias", "lacks"),
        ("blip.text_encoder.encoder.layer.0.crossattention.self.key.weight", "lacks"),
        ("mlp.layers.7.bias", r"layers\.7\.bias"),
    ],
)
def test_a_checkpoint_that_lacks_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop: str, message: str
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    tiny = write_image_reward(tmp_path / "reward")
    torch.save({name: x for name, x in tiny.tensors.items() if name != drop}, tiny.file)
    reward = rewards.build(
        "imagereward", {"weights": str(tiny.file), "tokenizer": str(tiny.folder / "tokenizer"), "vision_heads": 2}
    )
    with pytest.raises(CheckpointError, match=message):
        reward(torch.zeros(1, 3, 32, 32), ["x"])


def test_a_vocabulary_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    tiny = write_image_reward(tmp_path / "reward")
    words = "blip.text_encoder.embeddings.word_embeddings.weight"
    # one row short: the second of the two tokens that ImageReward adds has no embedding
    torch.save({**tiny.tensors, words: tiny.tensors[words][:-1]}, tiny.file)
    config = json.loads((tiny.folder / "med_config.json").read_text())
    (tiny.folder / "med_config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 1}))
    options = {"weights": str(tiny.folder), "tokenizer": str(tiny.folder / "tokenizer"), "vision_heads": 2}
    with pytest.raises(CheckpointError, match="entries, but the model has"):
        rewards.build("imagereward", options)(torch.zeros(1, 3, 32, 32), ["x"])
    del config["num_attention_heads"]
    (tiny.folder / "med_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        rewards.build("imagereward", options)(torch.zeros(1, 3, 32, 32), ["x"])


@pytest.mark.parametrize(
    ("heads", "message"),
    [({}, "128 wide, which is not a published size"), ({"vision_heads": 3}, "not divisible by 3 heads")],
)
def test_heads_that_no_weight_shows_are_stated_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: dict[str, int], message: str
) -> None:
    """One head of 128 channels would load as well as two of 64, and score otherwise."""
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    tiny = write_image_reward(tmp_path / "reward")
    options = {"weights": str(tiny.folder), "tokenizer": str(tiny.folder / "tokenizer"), **heads}
    with pytest.raises(CheckpointError, match=message):
        rewards.build("imagereward", options)(torch.zeros(1, 3, 32, 32), ["x"])
