"""Which advantages a recipe asks for."""

from __future__ import annotations

import pytest
import torch

from fmg import Recipe
from fmg.core.errors import RewardError
from fmg.core.types import PartialRewardOutput, RewardOutput
from fmg.rl import combined_advantages, group_advantages
from fmg.training.metrics import advantages

GROUPS = torch.arange(3).repeat_interleave(4)
WEIGHTS = {"shapes": 1.0, "jpeg-compressibility": 0.2}
NAMES = (*WEIGHTS, "shapes/strict")
PARTS = {name: torch.rand(12, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(NAMES)}
REWARDS = RewardOutput(PARTS["shapes"] + 0.2 * PARTS["jpeg-compressibility"], PARTS)


def recipe(combination: str, *, global_std: bool = True, weights: dict[str, float] = WEIGHTS) -> Recipe:
    return Recipe.default(
        rewards=[{"name": name, "weight": weight} for name, weight in weights.items()],
        **{
            "objective.reward_combination": combination,
            "objective.global_std": global_std,
            "objective.adv_clip_max": 1.5,
        },
    )


@pytest.mark.parametrize("global_std", [True, False])
def test_sum_compares_totals_and_per_reward_compares_the_weighted_rewards(global_std: bool) -> None:
    whole = advantages(REWARDS, GROUPS, recipe("sum", global_std=global_std), 0)
    assert torch.equal(whole, group_advantages(REWARDS.total, GROUPS, global_std=global_std, clip_max=1.5))
    own = advantages(REWARDS, GROUPS, recipe("per-reward", global_std=global_std), 0)
    # the parts of a reward, such as shapes/strict, are reported and not trained on
    assert torch.equal(own, combined_advantages(PARTS, WEIGHTS, GROUPS, global_std=global_std, clip_max=1.5))
    assert not torch.allclose(own, whole)


def test_one_reward_is_the_same_either_way_up_to_its_scale() -> None:
    rewards = RewardOutput(3 * PARTS["shapes"], {"shapes": PARTS["shapes"]})
    whole, own = (
        advantages(rewards, GROUPS, recipe(how, weights={"shapes": 3.0}).with_({"objective.adv_clip_max": 9.0}), 0)
        for how in ("sum", "per-reward")
    )
    torch.testing.assert_close(own / own.std(), whole / whole.std(), rtol=1e-3, atol=1e-4)


def test_per_reward_leaves_out_groups_with_a_gap() -> None:
    scored = torch.arange(12) != 5
    parts = {name: values.masked_fill(~scored, float("nan")) for name, values in PARTS.items()}
    total = REWARDS.total.masked_fill(~scored, float("nan"))
    gap = advantages(PartialRewardOutput(total, parts, scored), GROUPS, recipe("per-reward"), 0)
    rest = [*range(4), *range(8, 12)]
    kept = RewardOutput(REWARDS.total[rest], {name: values[rest] for name, values in PARTS.items()})
    assert gap[4:8].tolist() == [0.0] * 4
    assert torch.equal(gap[rest], advantages(kept, GROUPS[rest], recipe("per-reward"), 0))


@pytest.mark.parametrize("combination", ["sum", "per-reward"])
def test_a_reward_that_is_not_finite_is_refused(combination: str) -> None:
    broken = {**PARTS, "shapes": PARTS["shapes"].index_fill(0, torch.tensor([5]), float("nan"))}
    with pytest.raises(RewardError, match="not finite"):
        advantages(RewardOutput(broken["shapes"], broken), GROUPS, recipe(combination), 0)
