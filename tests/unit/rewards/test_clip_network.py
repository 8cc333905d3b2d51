"""Networks are loaded when they are needed, once, where they should be, and score in batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fmg.core.errors import CheckpointError, MissingDependencyError, UsageError
from fmg.core.protocols import Reward
from fmg.core.types import RewardOutput
from fmg.registry import rewards
from fmg.rewards.base import Mixture
from fmg.rewards.configs import CLIP_VIT_H_14, HPSV2, ClipScoreConfig
from fmg.rewards.network import Files, NetworkReward, Score
from tests.tiny_rewards import qwen_tokenizer, write_clip_folder


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "fmg"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


class Recorder:
    """A loader that notes what it is asked for, and scores an image by its mean."""

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


@pytest.mark.parametrize("name", ["aesthetic", "clipscore", "hpsv2", "hpsv3", "imagereward", "pickscore"])
def test_weights_are_asked_for_at_the_first_call_only(name: str) -> None:
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
