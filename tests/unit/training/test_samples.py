"""From prompts to advantages."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fmg import Recipe
from fmg.core.errors import RewardError
from fmg.core.types import PartialRewardOutput, Prompt, RewardOutput
from fmg.data.prompt_sets import PromptList
from fmg.rl import combined_advantages, group_advantages
from fmg.training.samples import DynamicPrompts, advantages, iteration_prompts, reward_metrics

SET = PromptList("numbers", [Prompt(str(i), "", {}) for i in range(7)])


def test_every_prompt_is_visited_equally_often() -> None:
    seen = Counter(p.text for i in range(14) for p in iteration_prompts(SET, 3, i, seed=5))
    assert set(seen.values()) == {6}


def test_an_iteration_depends_on_seed_and_iteration_alone() -> None:
    late = [p.text for p in iteration_prompts(SET, 3, 9, seed=5)]
    assert late == [p.text for p in iteration_prompts(SET, 3, 9, seed=5)]
    other = [p.text for p in iteration_prompts(SET, 7, 0, seed=1)]
    assert other != [p.text for p in iteration_prompts(SET, 7, 0, seed=0)]


def test_laps_have_different_orders() -> None:
    laps = [[p.text for p in iteration_prompts(SET, 7, i, seed=0)] for i in range(4)]
    assert len({tuple(lap) for lap in laps}) > 1


def test_a_prompt_with_equal_rewards_is_sampled_less_often_and_an_unscored_group_changes_nothing() -> None:
    prompts = DynamicPrompts(SET, floor=0.2, seed=0)
    prompts.learn([0, 1, 2], unequal=[True, False, False], scored=[True, True, False])
    assert prompts.weights.tolist() == [1.0, 0.5, *[1.0] * 5]
    for _ in range(5):
        prompts.learn([1], unequal=[False], scored=[True])
    assert prompts.weights[1] == 0.2
    prompts.learn([1], unequal=[False], scored=[False])
    assert prompts.weights[1] == 0.2 + 0.01 * 0.8


FOURS = torch.arange(3).repeat_interleave(4)
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
    whole = advantages(REWARDS, FOURS, recipe("sum", global_std=global_std), 0)
    assert torch.equal(whole, group_advantages(REWARDS.total, FOURS, global_std=global_std, clip_max=1.5))
    own = advantages(REWARDS, FOURS, recipe("per-reward", global_std=global_std), 0)
    # the parts of a reward, such as shapes/strict, are reported and not trained on
    assert torch.equal(own, combined_advantages(PARTS, WEIGHTS, FOURS, global_std=global_std, clip_max=1.5))
    assert not torch.allclose(own, whole)


def test_one_reward_is_the_same_either_way_up_to_its_scale() -> None:
    rewards = RewardOutput(3 * PARTS["shapes"], {"shapes": PARTS["shapes"]})
    whole, own = (
        advantages(rewards, FOURS, recipe(how, weights={"shapes": 3.0}).with_({"objective.adv_clip_max": 9.0}), 0)
        for how in ("sum", "per-reward")
    )
    torch.testing.assert_close(own / own.std(), whole / whole.std(), rtol=1e-3, atol=1e-4)


def test_per_reward_leaves_out_groups_with_a_gap() -> None:
    scored = torch.arange(12) != 5
    parts = {name: values.masked_fill(~scored, float("nan")) for name, values in PARTS.items()}
    total = REWARDS.total.masked_fill(~scored, float("nan"))
    gap = advantages(PartialRewardOutput(total, parts, scored), FOURS, recipe("per-reward"), 0)
    rest = [*range(4), *range(8, 12)]
    kept = RewardOutput(REWARDS.total[rest], {name: values[rest] for name, values in PARTS.items()})
    assert gap[4:8].tolist() == [0.0] * 4
    assert torch.equal(gap[rest], advantages(kept, FOURS[rest], recipe("per-reward"), 0))


@pytest.mark.parametrize("combination", ["sum", "per-reward"])
def test_a_reward_that_is_not_finite_is_refused(combination: str) -> None:
    broken = {**PARTS, "shapes": PARTS["shapes"].index_fill(0, torch.tensor([5]), float("nan"))}
    with pytest.raises(RewardError, match="not finite"):
        advantages(RewardOutput(broken["shapes"], broken), FOURS, recipe(combination), 0)


GROUPS = torch.tensor([0, 0, 1, 1, 2, 2])
SCORES = torch.tensor([0.0, 1.0, 0.5, 0.7, 0.2, 0.2])
RECIPE = Recipe.default()


def partial(*scored: bool) -> PartialRewardOutput:
    return PartialRewardOutput(SCORES, {"part": SCORES * 2}, torch.tensor(scored))


def test_a_group_with_a_gap_has_no_advantage_and_does_not_affect_the_others() -> None:
    gap = advantages(partial(True, False, True, True, True, True), GROUPS, RECIPE, 0)
    alone = advantages(RewardOutput(SCORES[2:], {}), GROUPS[2:], RECIPE, 0)
    assert gap[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(gap[2:], alone, rtol=0, atol=0)


def test_metrics_leave_out_what_has_no_score() -> None:
    metrics = reward_metrics(partial(False, False, True, True, True, True), GROUPS)
    assert metrics["reward/mean"] == float(SCORES[2:].double().mean())
    assert metrics["reward/part_mean"] == float(2 * SCORES[2:].double().mean())
    assert metrics["reward/dropped"] == 1 / 3
    assert metrics["zero_std_ratio"] == 0.5


def test_a_rollout_without_any_score_teaches_nothing() -> None:
    nothing = partial(*[False] * 6)
    assert advantages(nothing, GROUPS, RECIPE, 0).tolist() == [0.0] * 6
    assert reward_metrics(nothing, GROUPS) == {"reward/dropped": 1.0}


def test_shuffled_advantages_are_the_same_values_elsewhere() -> None:
    plain = advantages(RewardOutput(SCORES, {}), GROUPS, RECIPE, 3)
    shuffled = advantages(RewardOutput(SCORES, {}), GROUPS, RECIPE.with_({"train.shuffle_advantages": True}), 3)
    assert sorted(shuffled.tolist()) == sorted(plain.tolist())
    assert shuffled.tolist() != plain.tolist()
