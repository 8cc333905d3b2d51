"""Rollouts, group advantages and objectives: pure functions and values, without a trainer.

Names load on first use, so that `fmg.rl.configs` can be read without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmg.rl.advantages import combined_advantages, group_advantages, informative, shuffle_advantages, zero_std_ratio
    from fmg.rl.keyed_noise import NoiseKey
    from fmg.rl.replay import refresh_old, replay_ratio
    from fmg.rl.rollouts import rollout, sample, sample_rollout, window_steps

_HOME = {
    "NoiseKey": "keyed_noise",
    "combined_advantages": "advantages",
    "group_advantages": "advantages",
    "informative": "advantages",
    "refresh_old": "replay",
    "replay_ratio": "replay",
    "rollout": "rollouts",
    "sample": "rollouts",
    "sample_rollout": "rollouts",
    "shuffle_advantages": "advantages",
    "window_steps": "rollouts",
    "zero_std_ratio": "advantages",
}

__all__ = [
    "NoiseKey",
    "combined_advantages",
    "group_advantages",
    "informative",
    "refresh_old",
    "replay_ratio",
    "rollout",
    "sample",
    "sample_rollout",
    "shuffle_advantages",
    "window_steps",
    "zero_std_ratio",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fmg.rl' has no attribute '{name}'")
    return getattr(import_module(f"fmg.rl.{_HOME[name]}"), name)
