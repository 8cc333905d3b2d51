"""The names of CLIP weights in OpenCLIP's layout and in that of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from fmg.core.errors import CheckpointError
from fmg.rewards.clip import VIT_H_14, from_open_clip, open_clip_config
from tests.support.reward_layouts import to_open_clip
from tests.tiny_rewards import open_clip_shapes, random_tensors


def test_both_ways_give_back_every_tensor() -> None:
    tensors = random_tensors(open_clip_shapes())
    back = to_open_clip(from_open_clip(tensors))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_query_key_and_value_are_the_thirds_in_this_order() -> None:
    tensors = random_tensors(open_clip_shapes())
    renamed = from_open_clip(tensors)
    packed = tensors["visual.transformer.resblocks.1.attn.in_proj_weight"]
    for third, name in enumerate(("q_proj", "k_proj", "v_proj")):
        part = renamed[f"vision_model.encoder.layers.1.self_attn.{name}.weight"]
        assert torch.equal(part, packed[32 * third : 32 * (third + 1)])
    assert torch.equal(renamed["visual_projection.weight"], tensors["visual.proj"].T)


def test_full_size_has_every_tensor_of_vit_h_14() -> None:
    with torch.device("meta"):
        model = CLIPModel(open_clip_config(None))
    wanted = {name: x.shape for name, x in model.state_dict().items() if not name.endswith("position_ids")}
    published = to_open_clip(model.state_dict())
    assert sum(x.numel() for x in published.values()) == 986_109_441
    assert published["visual.transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
    assert {name: x.shape for name, x in from_open_clip(published).items()} == wanted


def test_options_of_an_open_clip_config(tmp_path: Path) -> None:
    described = {name: dict(part) if isinstance(part, dict) else part for name, part in VIT_H_14.items()}
    del described["vision_cfg"]["head_width"]
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": described | {"quick_gelu": True}}), encoding="utf-8")
    quick, plain = open_clip_config(file), open_clip_config(None)
    assert (quick.vision_config.hidden_act, quick.text_config.hidden_act) == ("quick_gelu", "quick_gelu")
    assert (plain.vision_config.hidden_act, plain.text_config.hidden_act) == ("gelu", "gelu")
    assert (quick.vision_config.num_attention_heads, plain.vision_config.num_attention_heads) == (20, 16)
    assert plain.text_config.eos_token_id == 49407


def test_the_causal_mask_is_dropped() -> None:
    assert from_open_clip({"attn_mask": torch.zeros(2, 2)}) == {}


@pytest.mark.parametrize(
    "name",
    [
        "visual.trunk.blocks.0.norm1.weight",
        "transformer.resblocks.0.attn.in_proj_scale",
        "transformer.resblocks.0.ln_3.weight",
        "module.logit_scale",
        "logit_bias",
    ],
)
def test_foreign_keys_are_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        from_open_clip({name: torch.zeros(3)})
