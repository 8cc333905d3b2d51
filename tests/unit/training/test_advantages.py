from __future__ import annotations

import pytest
import torch

from fmg.core.errors import RewardError
from fmg.core.types import RewardOutput
from fmg.rl import combined_advantages, group_advantages, shuffle_advantages
from fmg.rl.configs import GrpoConfig, RwfmConfig
from fmg.training.advantages import advantages

GROUPS = torch.arange(3).repeat_interleave(4)
PARTS = {name: torch.rand(12, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(("a", "b", "a/x"))}
WEIGHTS = {"a": 1.0, "b": 0.2}
REWARDS = RewardOutput(PARTS["a"] + 0.2 * PARTS["b"], PARTS)


@pytest.mark.parametrize("global_std", [True, False])
def test_sum_compares_totals_and_per_reward_compares_the_weighted_rewards(global_std: bool) -> None:
    options = GrpoConfig(global_std=global_std, adv_clip_max=1.5)
    whole = advantages(REWARDS, WEIGHTS, GROUPS, options, shuffle_seed=None)
    assert torch.equal(whole, group_advantages(REWARDS.total, GROUPS, global_std=global_std, clip_max=1.5))
    each = options.model_copy(update={"reward_combination": "per-reward"})
    own = advantages(REWARDS, WEIGHTS, GROUPS, each, shuffle_seed=None)
    # the parts of a reward, such as a/x, are reported and not trained on
    assert torch.equal(own, combined_advantages(PARTS, WEIGHTS, GROUPS, global_std=global_std, clip_max=1.5))
    assert not torch.allclose(own, whole)


def test_one_reward_is_the_same_either_way_up_to_its_scale() -> None:
    rewards = RewardOutput(3 * PARTS["a"], {"a": PARTS["a"]})
    whole = advantages(rewards, {"a": 3.0}, GROUPS, RwfmConfig(), shuffle_seed=None)
    own = advantages(rewards, {"a": 3.0}, GROUPS, RwfmConfig(reward_combination="per-reward"), shuffle_seed=None)
    torch.testing.assert_close(own / own.std(), whole / whole.std(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("combination", ["sum", "per-reward"])
def test_the_null_control_shuffles_the_same_values(combination: str) -> None:
    options = GrpoConfig.model_validate({"reward_combination": combination})
    plain = advantages(REWARDS, WEIGHTS, GROUPS, options, shuffle_seed=None)
    shuffled = advantages(REWARDS, WEIGHTS, GROUPS, options, shuffle_seed=7)
    assert torch.equal(shuffled, shuffle_advantages(plain, 7))


@pytest.mark.parametrize("combination", ["sum", "per-reward"])
def test_a_reward_that_is_not_finite_is_refused(combination: str) -> None:
    broken = {**PARTS, "b": PARTS["b"].index_fill(0, torch.tensor([5]), float("nan"))}
    options = GrpoConfig.model_validate({"reward_combination": combination})
    with pytest.raises(RewardError, match="not finite"):
        advantages(RewardOutput(broken["a"] + broken["b"], broken), WEIGHTS, GROUPS, options, shuffle_seed=None)
