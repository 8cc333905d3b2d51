"""Batch sizes that a recipe leaves open, and the attention kernels of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmg import Recipe, train
from fmg.core.events import Event
from fmg.training.attention import finite_attention
from fmg.training.sizes import Sizes, choose_sizes


def test_a_small_model_takes_a_whole_rollout_on_a_gpu_and_a_large_one_does_not() -> None:
    small, large = Recipe.default(None), Recipe.default("meanflow-flux")
    assert choose_sizes(small, "cuda") == Sizes(384, 384)
    assert choose_sizes(small, "cpu") == Sizes(96, 96)
    assert choose_sizes(large.with_({"train.micro_batch": None, "rollout.batch_size": None}), "cuda") == Sizes(16, 16)


def test_what_the_recipe_states_is_taken() -> None:
    stated = Recipe.default(None, **{"rollout.batch_size": 24, "train.micro_batch": 7})
    assert choose_sizes(stated, "cuda") == Sizes(24, 7)


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_attention_is_off_for_the_length_of_a_training_only(before: bool, tmp_path: Path) -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    heard: list[tuple[bool, bool]] = []

    def hear(event: Event) -> None:
        heard.append((enabled(), torch.backends.cuda.flash_sdp_enabled()))

    kernels = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, *([SDPBackend.CUDNN_ATTENTION] if before else [])]
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
    with sdpa_kernel(kernels):
        train(recipe, tmp_path / "run", hear)
        assert enabled() is before
    assert set(heard) == {(False, True)}


def test_the_other_kernels_stay() -> None:
    with finite_attention():
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
