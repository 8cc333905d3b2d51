"""What a trainer computes from rewards: advantages, log keys, and whether a run got worse."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fmg.core import metric_keys as keys
from fmg.core.types import RewardOutput
from fmg.registry.recipe import Recipe
from fmg.rewards.partial import complete_groups, select_rows
from fmg.rl import combined_advantages, group_advantages, shuffle_advantages, zero_std_ratio

# A decline is reported when the last held-out score is this many standard errors below the first.
DECLINE_ERRORS = 3.0


def advantages(rewards: RewardOutput, groups: Int[Tensor, " n"], recipe: Recipe, iteration: int) -> Float[Tensor, " n"]:
    """Group advantages as the recipe's objective wants them; 0 for groups with an image that has no score.

    They are those of the rewards' weighted sum, or with `reward_combination: per-reward` the weighted sum of each
    reward's own (docs/math.md, eq. 19 and 29). With `train.shuffle_advantages` they are dealt out to random samples,
    the null control.
    """
    kept = complete_groups(rewards, groups)
    values = torch.zeros(len(kept))
    if not bool(kept.any()):
        return values
    options, known = recipe.objective.config, select_rows(rewards, kept)
    global_std, clip_max = options.global_std, options.adv_clip_max
    if options.reward_combination == "per-reward":
        weights = {reward.label: reward.weight for reward in recipe.rewards}
        compared = combined_advantages(known.parts, weights, groups[kept], global_std=global_std, clip_max=clip_max)
    else:
        compared = group_advantages(known.total, groups[kept], global_std=global_std, clip_max=clip_max)
    if recipe.train.shuffle_advantages:
        compared = shuffle_advantages(compared, recipe.train.seed * 1_000_003 + iteration)
    values[kept] = compared
    return values


def reward_metrics(rewards: RewardOutput, groups: Int[Tensor, " n"]) -> dict[str, float]:
    """`reward/mean` with its spread and standard error, `reward/<name>_mean` for every part, `zero_std_ratio`.

    Groups with an image that has no score are left out; `reward/dropped` is their share of the images.
    """
    kept = complete_groups(rewards, groups)
    metrics = {keys.REWARD_DROPPED: float((~kept).double().mean())} if not bool(kept.all()) else {}
    if not bool(kept.any()):
        return metrics
    known = select_rows(rewards, kept)
    total = known.total.double()
    metrics |= {
        keys.REWARD: float(total.mean()),
        keys.REWARD_STD: float(total.std()),
        keys.REWARD_SE: float(total.std() / len(total) ** 0.5),
        keys.ZERO_STD_RATIO: zero_std_ratio(known.total, groups[kept]),
    }
    for name, values in known.parts.items():
        metrics[keys.reward_part(name)] = float(values.double().mean())
    return metrics


def decline(initial: Mapping[str, float], final: Mapping[str, float], key: str) -> str | None:
    """A warning when the held-out score `key` ended clearly below where it began, else None.

    Nothing is clear where a standard error is NaN, as that of a single image.
    """
    error = math.hypot(initial[keys.error_of(key)], final[keys.error_of(key)])
    if not final[key] - initial[key] < -DECLINE_ERRORS * error:
        return None
    return (
        f"The held-out score fell from {initial[key]:.3f} at iteration 0 to {final[key]:.3f}: lower the learning rate,"
        " use larger groups, or add a KL term (objective.kl_beta)."
    )
