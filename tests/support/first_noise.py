"""The noise that a generated image starts from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fmg.inference.generator import GENERATION_ITERATION
from fmg.rl.keyed_noise import NoiseKey
from fmg.rl.rollouts import noise


def first_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """(1, *shape): the initial noise of `Generator.generate` for this seed."""
    return noise([NoiseKey(seed, GENERATION_ITERATION, 0, 0, 0)], shape)
