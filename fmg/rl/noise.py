"""Noise as a pure function of its key: the same key gives the same bits on any machine, batch split or process count.

The numbers are those of `fmg.rl.keyed_noise`, as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.rl import keyed_noise
from fmg.rl.keyed_noise import OBJECTIVE, ROLLOUT, NoiseKey

__all__ = ["OBJECTIVE", "ROLLOUT", "NoiseKey", "noise", "uniform"]


def noise(keys: Sequence[NoiseKey], shape: Sequence[int], stream: str = ROLLOUT) -> Float[Tensor, "n *shape"]:
    """Standard normal noise, one independent sample a key, fp32 on the CPU.

    Args:
        keys: `n` keys; equal keys give equal noise.
        shape: shape of one sample.
        stream: separates draws for different purposes under the same keys; at most 16 bytes.
    """
    return torch.from_numpy(keyed_noise.normal(keys, shape, stream))


def uniform(keys: Sequence[NoiseKey], stream: str = OBJECTIVE) -> Float[Tensor, " n"]:
    """Uniform numbers in [0, 1), one a key, fp32 on the CPU."""
    return torch.from_numpy(keyed_noise.uniform(keys, stream))
