"""Advantages relative to the group of samples that share a prompt (Shao et al., arXiv 2402.03300, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fmg.core.errors import RewardError

RELATIVE_EPS = 1e-2
"""Upper bound of `eps` as a share of the largest absolute reward; it matters for rewards below 0.01."""


def group_advantages(
    rewards: Float[Tensor, " n"],
    groups: Int[Tensor, " n"],
    *,
    global_std: bool = True,
    clip_max: float = 5.0,
    eps: float = 1e-4,
) -> Float[Tensor, " n"]:
    """`A = (R - mean_group) / (std + eps)`, clamped to `[-clip_max, clip_max]` (docs/math.md, eq. 19).

    The std is the population std (divisor n), as in Flow-GRPO: of the group's rewards, or with `global_std` of the raw
    rewards of the whole batch. A group with equal rewards gets exactly 0, however its mean is rounded.

    Args:
        rewards: finite rewards.
        groups: group index of each sample, any integers in any order.
        global_std: whether to divide by the std of the batch instead of the group's.
        clip_max: bound on the absolute advantage.
        eps: added to the std, so that rounding differences do not count. If all rewards are small, it is at most a
            hundredth of the largest, so that their scale does not matter.

    Returns:
        fp32 advantages in the order of `rewards`.

    Raises:
        RewardError: a reward is not finite.
    """
    if rewards.shape != groups.shape or rewards.ndim != 1:
        raise ValueError(f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)} must be equal and 1-D")
    if not torch.isfinite(rewards).all():
        raise RewardError("A reward is not finite", "Return a finite number for every image.")
    values = rewards.double()
    index, count = _group_index(groups.to(rewards.device))
    mean = _group_mean(values, index, count)
    centred = values - mean[index]
    group_std = _group_mean(centred.square(), index, count).sqrt()
    std = values.std(correction=0).expand(count) if global_std else group_std
    eps = min(eps, RELATIVE_EPS * float(values.abs().max())) if len(values) else eps
    scaled = (centred / (std + eps)[index]).clamp(-clip_max, clip_max)
    return torch.where(unequal_groups(values, index)[index], scaled, 0.0).float()


def combined_advantages(
    rewards: Mapping[str, Float[Tensor, " n"]],
    weights: Mapping[str, float],
    groups: Int[Tensor, " n"],
    *,
    global_std: bool,
    clip_max: float = 5.0,
    eps: float = 1e-4,
) -> Float[Tensor, " n"]:
    """The weighted sum of each reward's own group advantage, divided by its std in the batch (docs/math.md, eq. 29).

    GDPO (Liu et al., arXiv 2601.05242): rewards with different units count only by their weights, and samples with
    equal sums are distinguished by their parts. The last division keeps the range for any number and scale of weights.

    Departures from the paper: each reward's std may be the batch's (`global_std`); the result is clamped once, at the
    end. Subtracting the batch mean is left out, since that of centred groups is 0.

    Args:
        rewards: finite rewards by name.
        weights: weight of each, by the same names; only their ratios count.
        groups: as in `group_advantages`, like the remaining arguments.

    Raises:
        RewardError: a reward is not finite.
    """
    total = torch.zeros(len(groups), dtype=torch.float64, device=groups.device)
    # `eps` is meant for advantages of about 1
    whole = sum(abs(weight) for weight in weights.values()) or 1.0
    for name, weight in weights.items():
        own = group_advantages(rewards[name], groups, global_std=global_std, clip_max=math.inf, eps=eps)
        total = total + weight / whole * own.to(total)
    return (total / (total.std(correction=0) + eps)).clamp(-clip_max, clip_max).float()


def zero_std_ratio(rewards: Float[Tensor, " n"], groups: Int[Tensor, " n"]) -> float:
    """Share of groups whose rewards are all equal, from which nothing can be learned."""
    return float((~unequal_groups(rewards, groups)).double().mean())


def unequal_groups(rewards: Float[Tensor, " n"], groups: Int[Tensor, " n"]) -> Bool[Tensor, " g"]:
    """Whether the rewards of each group differ, in ascending order of the groups' indices.

    False for a group with an unscored image (NaN). The comparison is exact, unlike a test of the std against 0.
    """
    index, count = _group_index(groups.to(rewards.device))
    empty = rewards.new_zeros(count)
    highest = empty.scatter_reduce(0, index, rewards, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, index, rewards, "amin", include_self=False)
    return highest > lowest


def informative(advantages: Float[Tensor, " n"], groups: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """True for the samples of groups with a nonzero advantage; updates leave out the others."""
    index, count = _group_index(groups.to(advantages.device))
    largest = advantages.new_zeros(count).scatter_reduce(0, index, advantages.abs(), "amax")
    return largest[index] > 0


def shuffle_advantages(advantages: Float[Tensor, " n"], seed: int) -> Float[Tensor, " n"]:
    """Randomly permuted advantages: the null control, under which a run must not improve."""
    order = torch.randperm(len(advantages), generator=torch.Generator().manual_seed(seed))
    return advantages[order.to(advantages.device)]


def _group_index(groups: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], int]:
    """Groups renumbered from 0, and their count."""
    labels, index = torch.unique(groups, return_inverse=True)
    return index, len(labels)


def _group_mean(values: Float[Tensor, " n"], index: Int[Tensor, " n"], count: int) -> Float[Tensor, " g"]:
    sums = values.new_zeros(count).index_add(0, index, values)
    sizes = values.new_zeros(count).index_add(0, index, torch.ones_like(values))
    return sums / sizes
