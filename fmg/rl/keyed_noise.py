"""Keyed noise as numpy arrays; `fmg.rl.rollouts` gives the same bits as tensors. Imports no torch.

The numbers come from numpy's counter-based Philox generator (Salmon et al., 2011, "Parallel random numbers: as easy as
1, 2, 3") under a 128-bit hash of the key. A torch CPU generator is unsuitable: it keeps only 32 bits of its seed, so
some of a million draws would coincide, and its normal numbers depend on the vector instructions of the CPU.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROLLOUT = "rollout"
"""Stream of the noise that images are generated from."""
OBJECTIVE = "objective"
"""Stream of the noise that an objective adds to finished samples."""
# A prime larger than the number of iterations or images of a run, so that two runs share no seed.
_SEED_STRIDE = 1_000_003


class NoiseKey(NamedTuple):
    """Identifies one random draw; any integers, also negative ones.

    Attributes:
        seed: seed of the run, or of one generated image.
        iteration: training iteration.
        group: prompt group.
        member: index within the group.
        step: 0 for the initial noise, k + 1 for the noise of grid interval k.
    """

    seed: int
    iteration: int
    group: int
    member: int
    step: int


def normal(keys: Sequence[NoiseKey], shape: Sequence[int], stream: str = ROLLOUT) -> NDArray[np.float32]:
    """Standard normal noise (n, *shape), one independent sample per key.

    Args:
        keys: `n` keys; equal keys give equal noise.
        shape: shape of one sample.
        stream: separates draws for different purposes under the same keys; at most 16 bytes.
    """
    out = np.empty((len(keys), math.prod(shape)), dtype=np.float32)
    source = _KeyedGenerator(stream)
    for row, key in zip(out, keys, strict=True):
        source.at(key).standard_normal(dtype=np.float32, out=row)
    return out.reshape(len(keys), *shape)


def uniform(keys: Sequence[NoiseKey], stream: str = OBJECTIVE) -> NDArray[np.float32]:
    """Uniform numbers (n,) in [0, 1), one per key."""
    source = _KeyedGenerator(stream)
    return np.array([source.at(key).random(dtype=np.float32) for key in keys], dtype=np.float32)


def sub_seed(seed: int, number: int) -> int:
    """The seed of one iteration or one image of a run, for generators that take a single number."""
    return seed * _SEED_STRIDE + number


class _KeyedGenerator:
    """One Philox generator that is moved to the start of each key's stream: four times cheaper than a new one."""

    def __init__(self, stream: str) -> None:
        self._person = stream.encode()
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._start = self._bits.state

    def at(self, key: NoiseKey) -> np.random.Generator:
        digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=16, person=self._person).digest()
        start = self._start
        self._bits.state = {
            **start,
            "state": {
                "counter": start["state"]["counter"],
                "key": np.frombuffer(digest, dtype="<u8").astype(np.uint64),
            },
        }
        return self._generator
