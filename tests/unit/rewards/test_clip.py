"""CLIP: the names of its weights in two layouts, the cleaning of text, loading when needed, scoring in batches."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from fmg.core.errors import CheckpointError, MissingDependencyError, UsageError
from fmg.core.protocols import Reward
from fmg.core.types import RewardOutput
from fmg.registry import rewards
from fmg.rewards.base import Mixture
from fmg.rewards.clip import VIT_H_14, clean, from_open_clip, open_clip_config
from fmg.rewards.configs import ClipScoreConfig
from fmg.rewards.network import Files, NetworkReward, Score
from fmg.rewards.published import CLIP_VIT_H_14, HPSV2
from tests.support.reward_layouts import to_open_clip
from tests.tiny_rewards import (
    open_clip_shapes,
    qwen_tokenizer,
    random_tensors,
    write_clip_folder,
    write_clip_tokenizer,
    write_open_clip,
)


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


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Red  Cat", "a red cat"),
        ("“curly” ‘quotes’", "\"curly\" 'quotes'"),
        ("cats &amp; dogs", "cats & dogs"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("<b> &amp;amp;amp;", "<b> &amp;"),
        ("schÃ¶n", "schön"),
        ("line\nbreak\tand\u00a0space ", "line break and space"),
        ("", ""),
        ("&nbsp;", ""),
        ("🦊 NAÏVE", "🦊 naïve"),
    ],
)
def test_clean(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_without_ftfy_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("fmg.core.runtime.find_spec", lambda name: None if name == "ftfy" else find(name))
    with pytest.raises(MissingDependencyError) as caught:
        rewards.build("hpsv2")
    assert str(caught.value).count("\n") == 0
    assert "pip install 'flow-map-grpo[rewards]'" in str(caught.value)


def test_prompts_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    tiny, tokenizer = write_open_clip(tmp_path / "hps"), write_clip_tokenizer(tmp_path / "tokenizer")
    reward = rewards.build("hpsv2", {"weights": str(tiny.file), "tokenizer": str(tokenizer)})
    start = "a cat on a mat, " * 8
    prompts = [
        "",
        " ",
        "x" * 10_000,
        start,
        start + "y" * 10_000,
        "小さな猫 🐈 \u202e",
        "<|endoftext|> after",
        "\x00\x07",
    ]
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(len(prompts), -1, -1, -1)
    scores = reward(images, prompts).total
    assert scores.isfinite().all()
    assert torch.equal(scores[0], scores[1])
    # what comes after 77 tokens does not count
    torch.testing.assert_close(scores[3], scores[4], rtol=0, atol=1e-6)
    assert scores[3] != scores[2]


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "fmg"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


class Recorder:
    """A loader that records its requests; it scores an image by its mean."""

    def __init__(self) -> None:
        self.loads: list[tuple[set[str], str, torch.dtype]] = []
        self.batches: list[list[str]] = []

    def __call__(self, files: Files, device: torch.device, dtype: torch.dtype) -> Score:
        self.loads.append((set(files), str(device), dtype))

        def score(images: Tensor, prompts: list[str]) -> RewardOutput:
            self.batches.append(list(prompts))
            mean = images.mean((1, 2, 3))
            return RewardOutput(mean, {"twice": 2 * mean})

        return score  # type: ignore[return-value]


def test_loads_once_and_scores_in_batches(tmp_path: Path) -> None:
    folder = write_clip_folder(tmp_path / "clip")
    recorder = Recorder()
    config = ClipScoreConfig(weights=str(folder), batch_size=2, dtype="bf16")
    reward = NetworkReward("clipscore", config, recorder)
    assert recorder.loads == []
    reward.load()
    images = torch.rand(5, 3, 8, 8)
    output = reward(images, list("abcde"))
    assert recorder.loads == [({"model", "tokenizer"}, "cpu", torch.bfloat16)]
    assert recorder.batches == [["a", "b"], ["c", "d"], ["e"]]
    assert torch.equal(output.total, torch.cat([images[i : i + 2].mean((1, 2, 3)) for i in (0, 2, 4)]))
    assert torch.equal(output.parts["twice"], 2 * output.total)
    assert reward(images[:0], []).total.shape == (0,)


@pytest.mark.parametrize(
    "name",
    ["aesthetic", "clipscore", "deqa", "geneval2", "hpsv2", "hpsv3", "imagereward", "pickscore", "unifiedreward"],
)
def test_weights_are_requested_at_the_first_call_only(name: str) -> None:
    reward: Reward = rewards.build(name)
    with pytest.raises(MissingDependencyError, match=f"fmg fetch reward {name}"):
        reward(torch.zeros(1, 3, 32, 32), ["x"])


def test_a_file_under_a_published_name_has_to_be_the_published_one(tmp_path: Path) -> None:
    for source, name in ((HPSV2, "HPS_v2.1_compressed.pt"), (CLIP_VIT_H_14, "tokenizer.json")):
        repository, revision = source.split("@")
        file = tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / revision / name
        file.parent.mkdir(parents=True)
        file.write_text("something else")
    with pytest.raises(CheckpointError, match="is not the published file"):
        rewards.build("hpsv2")(torch.zeros(1, 3, 32, 32), ["x"])


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    folder = write_clip_folder(tmp_path / "clip")
    reward = rewards.build("clipscore", {"weights": str(folder), "device": "cuda:99"})
    with pytest.raises(UsageError, match="'cuda:99' of the reward 'clipscore'"):
        reward(torch.zeros(1, 3, 32, 32), ["x"])
    with pytest.raises(UsageError, match="device"):
        rewards.build("clipscore", {"device": "tpu"})


def test_scores_do_not_depend_on_the_batch_and_repeat_prompts_cheaply(tmp_path: Path) -> None:
    folder = write_clip_folder(tmp_path / "clip")
    images = torch.rand(6, 3, 40, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "dogs and more dogs", "a cat", "", "a cat", "dogs and more dogs"]
    scores = [
        rewards.build("clipscore", {"weights": str(folder), "batch_size": size})(images, prompts).total
        for size in (1, 4, 6)
    ]
    assert scores[0].unique().numel() == 6
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=0, atol=1e-6)


def test_half_precision_stays_near_and_returns_fp32(tmp_path: Path) -> None:
    folder = write_clip_folder(tmp_path / "clip")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact, rounded = (
        rewards.build("clipscore", {"weights": str(folder), "dtype": dtype})(images, ["a", "b", "c"]).total
        for dtype in ("fp32", "bf16")
    )
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.03)
    assert not torch.equal(rounded, exact)


def test_in_a_mixture(tmp_path: Path) -> None:
    folder = write_clip_folder(tmp_path / "clip")
    images = torch.rand(2, 3, 32, 32)
    clip = rewards.build("clipscore", {"weights": str(folder)})
    output = Mixture([("clipscore", clip, 3.0)])(images, ["a", "b"])
    torch.testing.assert_close(output.total, 3 * clip(images, ["a", "b"]).total)
    assert output.parts.keys() == {"clipscore", "clipscore/cosine"}


def test_a_tokenizer_that_does_not_belong_to_the_model(tmp_path: Path) -> None:
    folder = write_clip_folder(tmp_path / "clip")
    other = tmp_path / "other"
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(600)])
    tokenizer.save_pretrained(str(other))
    reward = rewards.build("pickscore", {"weights": str(folder), "tokenizer": str(other)})
    with pytest.raises(CheckpointError, match="tokenizer"):
        reward(torch.zeros(1, 3, 32, 32), ["x"])
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer"):
        rewards.build("clipscore", {"weights": str(folder)})(torch.zeros(1, 3, 32, 32), ["x"])
