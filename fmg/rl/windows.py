"""Which steps of a rollout are stochastic and trained: all, or a window that moves over the iterations. No torch."""

from __future__ import annotations

import numpy as np

from fmg.registry.sections import WindowSection

# Keeps the draws apart from others of the same seed.
_STREAM = 0x77696E646F77


def window_steps(window: WindowSection | None, steps: int, *, iteration: int, seed: int) -> tuple[int, ...]:
    """Indices of the stochastic grid intervals in one iteration (docs/math.md, eq. 28).

    `fixed` stays at its start. `random` begins anywhere from there on, drawn anew every `every` iterations and the same
    for all samples (Flow-GRPO-Fast). `progressive` moves on by one step every `every` iterations, from the noisy steps
    to the clean ones, and stays at the last (MixGRPO, Li et al., arXiv 2507.21802, with stride 1 and a constant
    interval).

    Args:
        window: of a recipe that was checked against `steps`; None makes every interval but the last stochastic.
        steps: intervals of the grid, N; the last is always deterministic.
        iteration: training iteration, from 0.
        seed: seed of the run, which keys the random windows.

    Returns:
        Consecutive indices in [0, N - 2], rising.
    """
    if window is None:
        return tuple(range(steps - 1))
    first = _first_step(window, steps - 1 - window.size, iteration // window.every, seed)
    return tuple(range(first, first + window.size))


def _first_step(window: WindowSection, last: int, moves: int, seed: int) -> int:
    if window.mode == "fixed":
        return window.start
    if window.mode == "random":
        return int(np.random.default_rng((seed, moves, _STREAM)).integers(window.start, last + 1))
    return min(window.start + moves, last)
