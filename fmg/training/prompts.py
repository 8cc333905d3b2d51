"""Which prompts an iteration trains on: a seeded walk that visits every prompt equally often."""

from __future__ import annotations

import numpy as np

from fmg.core.protocols import PromptSet
from fmg.core.types import Prompt


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
