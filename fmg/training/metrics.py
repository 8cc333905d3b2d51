"""Log keys of an iteration."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from fmg.core.types import RewardOutput
from fmg.rl import zero_std_ratio


def reward_metrics(rewards: RewardOutput, groups: Int[Tensor, " n"]) -> dict[str, float]:
    """`reward/mean` with its spread and standard error, `reward/<name>_mean` for every part, `zero_std_ratio`."""
    total = rewards.total.double()
    metrics = {
        "reward/mean": float(total.mean()),
        "reward/std": float(total.std()),
        "reward/se": float(total.std() / len(total) ** 0.5),
        "zero_std_ratio": zero_std_ratio(rewards.total, groups),
    }
    for name, values in rewards.parts.items():
        metrics[f"reward/{name.replace('/', '_')}_mean"] = float(values.double().mean())
    return metrics
