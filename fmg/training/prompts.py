"""Which prompts an iteration trains on: every one equally often, or less often those that teach nothing lately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fmg.core.protocols import PromptSet
from fmg.core.types import Prompt

# Keeps the draws apart from others of the same seed.
_STREAM = 0x70726F6D707473
# A prompt whose group had equal rewards keeps this share of its weight; every iteration brings all weights back by
# that share of what they lack.
_KEPT, _RECOVERY = 0.5, 0.01


def iteration_prompts(prompts: PromptSet, groups: int, iteration: int, seed: int) -> list[Prompt]:
    """The `groups` prompts of an iteration.

    The set is walked in a new random order each time it has been used up, so the prompts of an iteration depend on
    (seed, iteration) alone and a resumed or sharded run sees the same ones.
    """
    size = len(prompts)
    start = iteration * groups
    chosen = []
    orders: dict[int, list[int]] = {}
    for position in range(start, start + groups):
        lap = position // size
        if lap not in orders:
            orders[lap] = [int(i) for i in np.random.default_rng((seed, lap)).permutation(size)]
        chosen.append(prompts[orders[lap][position % size]])
    return chosen


@dataclass
class DynamicPrompts:
    """Samples prompts whose groups had equal rewards lately less often (DAPO, arXiv 2503.14476, as weights).

    DAPO generates until every group has unequal rewards; here no image is thrown away, and no prompt for good. The
    weights are part of what a run resumes from.

    Attributes:
        prompts: the training prompts.
        floor: least weight; a prompt that still teaches has 1.
        seed: seed of the run, which with the iteration keys every draw.
    """

    prompts: PromptSet
    floor: float
    seed: int
    weights: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = np.ones(len(self.prompts))

    def choose(self, iteration: int, groups: int) -> list[int]:
        """Indices of the prompts of an iteration; none twice before all are used."""
        draw = np.random.default_rng((self.seed, iteration, _STREAM))
        chosen: list[int] = []
        while len(chosen) < groups:
            # weighted sampling without replacement (Efraimidis and Spirakis, 2006)
            order = np.argsort(np.log(draw.random(len(self.weights))) / self.weights)[::-1]
            chosen += [int(i) for i in order[: groups - len(chosen)]]
        return chosen

    def learn(self, chosen: Sequence[int], teaches: Sequence[bool]) -> None:
        """Takes whether the group of each chosen prompt had unequal rewards."""
        self.weights += _RECOVERY * (1 - self.weights)
        for prompt, taught in zip(chosen, teaches, strict=True):
            self.weights[prompt] = 1.0 if taught else max(self.floor, _KEPT * self.weights[prompt])
