from __future__ import annotations

import numpy as np
import pytest
import torch

from fmg import Recipe
from fmg.core.types import PartialRewardOutput, RewardOutput
from fmg.eval.scoring import Scores, means
from fmg.training.metrics import advantages, decline, reward_metrics

GROUPS = torch.tensor([0, 0, 1, 1, 2, 2])
SCORES = torch.tensor([0.0, 1.0, 0.5, 0.7, 0.2, 0.2])
RECIPE = Recipe.default()


def partial(*scored: bool) -> PartialRewardOutput:
    return PartialRewardOutput(SCORES, {"part": SCORES * 2}, torch.tensor(scored))


def test_a_group_with_a_gap_has_no_advantage_and_no_say_in_the_others() -> None:
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


def test_one_image_has_no_standard_error_and_shows_no_decline() -> None:
    one = means(Scores({("shapes", "total"): np.array([0.9])}, ("a",), ("",)))
    assert one["eval/shapes_mean"] == 0.9
    assert np.isnan(one["eval/shapes_se"])
    two = means(Scores({("shapes", "total"): np.array([0.9, 0.7])}, ("a", "b"), ("", "")))
    assert two["eval/shapes_se"] == pytest.approx(0.1 / 2**0.5)
    before, after = ({"eval/score": value, "eval/score_se": one["eval/shapes_se"]} for value in (0.9, 0.1))
    assert decline(before, after, "eval/score") is None


def test_only_a_clear_decline_is_said() -> None:
    before = {"eval/score": 0.50, "eval/score_se": 0.01}
    assert decline(before, {"eval/score": 0.47, "eval/score_se": 0.01}, "eval/score") is None
    assert "0.500" in str(decline(before, {"eval/score": 0.45, "eval/score_se": 0.01}, "eval/score"))
