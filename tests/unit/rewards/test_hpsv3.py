"""HPSv3's key map, wording, image sizes and patches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fmg.core.errors import CheckpointError, UsageError
from fmg.registry import rewards
from fmg.rewards.base import checked
from fmg.rewards.hpsv3 import PIXELS, from_hpsv3, read_instruction
from fmg.rewards.images import to_bytes
from fmg.rewards.qwen_vl import Patches, scaled_size
from tests.support.reward_layouts import to_hpsv3
from tests.tiny_rewards import Tiny, write_hpsv3


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return write_hpsv3(tmp_path / "hpsv3")


def options(tiny: Tiny) -> dict[str, object]:
    return {
        "weights": str(tiny.file),
        "base": str(tiny.folder / "base"),
        "instruction": str(tiny.folder / "instruction.py"),
    }


def test_names_both_ways(tiny: Tiny) -> None:
    tensors = {name: x for name, x in tiny.tensors.items() if name != "lm_head.weight"}
    renamed = from_hpsv3(tiny.tensors)
    assert {"base.visual.patch_embed.proj.weight", "base.language_model.norm.weight", "head.5.bias"} <= set(renamed)
    back = to_hpsv3(renamed)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    with pytest.raises(CheckpointError, match=r"v_head\.weight"):
        from_hpsv3({"v_head.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("size", "scaled"),
    [
        ((512, 512), (448, 448)),
        ((1024, 1024), (448, 448)),
        ((256, 256), (448, 448)),
        ((448, 448), (448, 448)),
        ((1024, 768), (504, 364)),
        ((10, 2000), (56, 6356)),
        ((1, 1), (448, 448)),
    ],
)
def test_scaled_size(size: tuple[int, int], scaled: tuple[int, int]) -> None:
    assert scaled_size(*size, 28, PIXELS, PIXELS) == scaled
    assert abs(scaled[0] * scaled[1] / PIXELS - 1) < 0.8


@pytest.mark.parametrize(("height", "width"), [(448, 448), (30, 75)])
def test_patches_are_those_of_the_image_processor(height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    rows, columns = scaled_size(height, width, 28, PIXELS, PIXELS)
    pictures = [Image.fromarray(x).resize((columns, rows), Image.Resampling.BICUBIC) for x in to_bytes(images)]
    expected = Qwen2VLImageProcessorPil()(images=pictures, return_tensors="pt")
    patches, grid = Patches(side=14, merge=2, frames=2, least=PIXELS, most=PIXELS).of(images)
    torch.testing.assert_close(patches, expected.pixel_values, rtol=0, atol=1e-6)
    assert torch.equal(grid.expand(2, 3), expected.image_grid_thw)


def test_the_wording_is_read_and_not_run(tmp_path: Path, tiny: Tiny) -> None:
    file = tiny.folder / "instruction.py"
    wording = read_instruction(file, published=False)
    assert wording.about("a {b} cat") == ("\nRate it.\nTextual prompt - a {b} cat\n\nRatings: <|Reward|>\n\nEND\n")
    with pytest.raises(CheckpointError, match=r"not that of hpsv3 1\.0\.0"):
        read_instruction(file, published=True)
    twice = "INSTRUCTION = '{text_prompt} {more}'; prompt_with_special_token = '<|Reward|>'"
    for text in (
        twice,
        "INSTRUCTION = 'a'",
        "INSTRUCTION = f()",
        "(",
        "INSTRUCTION = prompt_with_special_token = 'no token'",
    ):
        (tmp_path / "a.py").write_text(text)
        with pytest.raises(CheckpointError, match=r"a\.py"):
            read_instruction(tmp_path / "a.py", published=False)


def test_prompts_with_markers_of_the_model_are_refused(tiny: Tiny) -> None:
    reward = checked("hpsv3", rewards.build("hpsv3", options(tiny)))
    for marker in ("<|Reward|>", "<|image_pad|>", "<|im_end|>"):
        with pytest.raises(UsageError, match="reads as a special token"):
            reward.check_prompts(["a cat", f"a {marker} cat"])
        with pytest.raises(UsageError, match="reads as a special token"):
            reward(torch.zeros(1, 3, 32, 32), [f"{marker}"])
    reward.check_prompts(["a <cat> | a dog", ""])


def test_prompts_of_every_length_in_bf16(tiny: Tiny) -> None:
    reward = rewards.build("hpsv3", {**options(tiny), "batch_size": 3})
    prompts = ["", "x" * 1_000, "小さな猫 🐈"]
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    together = reward(images, prompts)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]).total for i in range(3)])
    assert together.total.dtype == torch.float32
    torch.testing.assert_close(together.total, alone, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("model.embed_tokens.weight", "no token embeddings"),
        ("model.layers.1.mlp.up_proj.weight", "lacks"),
        ("visual.merger.ln_q.weight", "lacks"),
        ("rm_head.3.bias", r"3\.bias"),
    ],
)
def test_a_checkpoint_that_lacks_a_tensor(tiny: Tiny, drop: str, message: str) -> None:
    save_file({name: x for name, x in tiny.tensors.items() if name != drop}, tiny.file)
    with pytest.raises(CheckpointError, match=message):
        rewards.build("hpsv3", options(tiny))(torch.zeros(1, 3, 32, 32), ["x"])


def test_an_embedding_is_needed_for_the_reward_token(tiny: Tiny) -> None:
    rows = tiny.tensors["model.embed_tokens.weight"]
    save_file({**tiny.tensors, "model.embed_tokens.weight": rows[:-1].clone()}, tiny.file)
    with pytest.raises(CheckpointError, match="entries, but the model"):
        rewards.build("hpsv3", options(tiny))(torch.zeros(1, 3, 32, 32), ["x"])
