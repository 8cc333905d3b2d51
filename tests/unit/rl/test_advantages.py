from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fmg.core.errors import RewardError
from fmg.rl import group_advantages, informative, shuffle_advantages, zero_std_ratio

finite = st.floats(-1e3, 1e3, width=32)
reward_arrays = hnp.arrays(np.float32, st.integers(2, 24), elements=finite)


@given(reward_arrays, st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_properties(values: NDArray[np.float32], count: int, global_std: bool) -> None:
    rewards = torch.from_numpy(values)
    groups = torch.arange(len(rewards)) % count
    advantages = group_advantages(rewards, groups, global_std=global_std, clip_max=1e9)
    assert advantages.dtype == torch.float32
    assert bool(advantages.isfinite().all())
    for group in groups.unique():
        members = groups == group
        inside, given = advantages[members].double(), rewards[members]
        # centred, ordered as the rewards are, and exactly 0 where there is nothing to prefer
        assert abs(float(inside.sum())) <= 1e-5 * (1 + float(inside.abs().sum()))
        order = given.argsort()
        assert bool((inside[order].diff() >= 0).all())
        if given.max() == given.min():
            assert inside.eq(0).all()
            assert not informative(advantages, groups)[members].any()
    bounded = group_advantages(rewards, groups, global_std=global_std, clip_max=0.5)
    torch.testing.assert_close(bounded, advantages.clamp(-0.5, 0.5))


@given(reward_arrays, st.floats(0.1, 10), st.floats(-5, 5), st.randoms())
@settings(max_examples=40, deadline=None)
def test_units_and_order_do_not_matter(
    values: NDArray[np.float32], scale: float, offset: float, random: np.random.RandomState
) -> None:
    rewards = torch.from_numpy(values).double()
    groups = torch.arange(len(rewards)) % 2
    plain = group_advantages(rewards, groups, global_std=True, eps=0.0)
    rescaled = group_advantages(rewards * scale + offset, groups, global_std=True, eps=0.0)
    if rewards.std() > 1e-2:
        torch.testing.assert_close(rescaled, plain, rtol=1e-3, atol=1e-4)
    order = list(range(len(rewards)))
    random.shuffle(order)
    permuted = group_advantages(rewards[order], groups[order] * 7 - 3, global_std=True, eps=0.0)
    torch.testing.assert_close(permuted, plain[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("global_std", [True, False])
def test_rewards_of_any_scale_teach_alike_and_ordinary_ones_as_flow_grpo(global_std: bool) -> None:
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = torch.arange(24) // 4
    plain = group_advantages(rewards, groups, global_std=global_std)
    index = (groups[:, None] == groups).double()
    mean = index @ rewards / 4
    spread = rewards.std(correction=0) if global_std else (index @ (rewards - mean).square() / 4).sqrt()
    torch.testing.assert_close(plain, ((rewards - mean) / (spread + 1e-4)).float(), rtol=0, atol=1e-6)
    tiniest = group_advantages(rewards * 1e-12, groups, global_std=global_std)
    for scale in (1e-3, 1e-6, 1e-9):
        tiny = group_advantages(rewards * scale, groups, global_std=global_std)
        torch.testing.assert_close(tiny, tiniest)
        torch.testing.assert_close(tiny, plain, rtol=0.2, atol=0)


def test_rounding_alone_is_not_a_preference() -> None:
    groups = torch.zeros(4, dtype=torch.long)
    for size in (1.0, 1e-6):
        rewards = torch.tensor([1.0, 1 + 2**-23, 1.0, 1.0]) * size
        assert float(group_advantages(rewards, groups, global_std=False).abs().max()) < 1e-2


def test_shuffled_advantages_are_a_permutation_across_groups() -> None:
    advantages = torch.arange(64).float()
    shuffled = shuffle_advantages(advantages, seed=3)
    assert torch.equal(shuffled.sort().values, advantages)
    assert not torch.equal(shuffled, advantages)
    assert torch.equal(shuffled, shuffle_advantages(advantages, seed=3))
    assert not torch.equal(shuffled, shuffle_advantages(advantages, seed=4))
    assert bool(((shuffled // 8) != (advantages // 8)).float().mean() > 0.5)


def test_informative_keeps_every_member_of_a_group_with_a_preference() -> None:
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    advantages = torch.tensor([0.0, 1.0, -1.0, 0.0, 0.0, 2.0, 2.0])
    assert informative(advantages, groups).tolist() == [True, True, True, False, False, True, True]


def test_zero_std_ratio() -> None:
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    assert zero_std_ratio(torch.tensor([0.1, 0.1, 0.0, 1.0, 0.3, 0.4, 5.0]), groups) == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rewards_must_be_finite(value: float) -> None:
    with pytest.raises(RewardError, match="not finite"):
        group_advantages(torch.tensor([0.0, value]), torch.tensor([0, 0]), global_std=True)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="1-D"):
        group_advantages(torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.long), global_std=True)


def test_the_std_is_that_of_the_batch_by_default() -> None:
    rewards, groups = torch.tensor([0.0, 1.0, 0.0, 4.0]), torch.tensor([0, 0, 1, 1])
    assert torch.equal(group_advantages(rewards, groups), group_advantages(rewards, groups, global_std=True))
