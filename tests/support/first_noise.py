"""The noise that a generated image starts from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fmg.inference.generator import GENERATION_ITERATION
from fmg.rl.keyed_noise import NoiseKey
from fmg.rl.rollouts import noise


def first_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """(1, *shape): what `Generator.generate` draws for this seed before its first network call."""
    return noise([NoiseKey(seed, GENERATION_ITERATION, 0, 0, 0)], shape)
