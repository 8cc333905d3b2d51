"""What `train` sets for its own length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmg import Recipe, train


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_cudnn_attention_is_off_for_the_length_of_a_training_only(before: bool, tmp_path: Path) -> None:
    cuda = torch.backends.cuda
    heard: list[tuple[bool, ...]] = []

    def flags() -> tuple[bool, ...]:
        return cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()

    recipe = Recipe.default(
        None,
        **{
            "train.device": "cpu",
            "train.iterations": 1,
            "rollout.groups": 1,
            "rollout.group_size": 2,
            "eval.num": 2,
            "eval.rewards": [],
        },
    )
    kernels = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, *([SDPBackend.CUDNN_ATTENTION] if before else [])]
    with sdpa_kernel(kernels):
        train(recipe, tmp_path / "run", lambda _: heard.append(flags()))
        assert flags() == (before, True, False)
    assert set(heard) == {(False, True, False)}
