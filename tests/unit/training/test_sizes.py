"""Batch sizes that a recipe leaves open, and the attention kernels of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmg import Recipe, train
from fmg.training.processes import Share
from fmg.training.sizes import Sizes, choose_sizes


def test_a_small_model_takes_a_whole_rollout_on_a_gpu_and_a_large_one_does_not() -> None:
    small, large = Recipe.default(None), Recipe.default("meanflow-flux")
    assert choose_sizes(small, "cuda") == Sizes(384, 384)
    assert choose_sizes(small, "cpu") == Sizes(96, 96)
    assert choose_sizes(large.with_({"train.micro_batch": None, "rollout.batch_size": None}), "cuda") == Sizes(16, 16)


@pytest.mark.parametrize(("processes", "rows"), [(2, 192), (3, 128), (8, 48)])
def test_every_process_has_a_share_of_what_a_small_model_draws(processes: int, rows: int) -> None:
    sizes = choose_sizes(Recipe.default(None), "cuda", processes)
    assert sizes == Sizes(rows, rows)
    assert all(Share(384, rank, processes, sizes.rollout_batch).own > 0 for rank in range(processes))


@pytest.mark.parametrize(("groups", "processes"), [(72, 2), (100, 3), (144, 4)])
def test_shares_of_more_than_a_call_are_equal_calls(groups: int, processes: int) -> None:
    sizes = choose_sizes(Recipe.default(None, **{"rollout.groups": groups}), "cuda", processes)
    own = [Share(16 * groups, rank, processes, sizes.rollout_batch).own for rank in range(processes)]
    assert max(own) - min(own) <= processes
    assert sizes.rollout_batch <= 512


def test_bf16_calls_which_are_padded_stay_small() -> None:
    assert choose_sizes(Recipe.default(None, **{"train.dtype": "bf16"}), "cuda") == Sizes(16, 16)


def test_what_the_recipe_states_is_taken() -> None:
    stated = Recipe.default(None, **{"rollout.batch_size": 24, "train.micro_batch": 7})
    assert choose_sizes(stated, "cuda") == Sizes(24, 7)


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
