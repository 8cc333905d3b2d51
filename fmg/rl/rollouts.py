"""Sampling from a flow map: with the transitions that a policy gradient needs, or the final samples only.

The functions run on any object with the members of `fmg.core.protocols.FlowMap`, without gradients, in chunks of a
fixed size. Noise is keyed by (seed, iteration, group, member, step), so it depends on nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.core.protocols import FlowMap, Stochasticizer
from fmg.core.types import (
    Conditioning,
    SampleRollout,
    StateRollout,
    Transition,
    TransitionRollout,
    cat_transitions,
)
from fmg.flow.sampling import native_sample, native_states
from fmg.recipe.sections import WindowSection
from fmg.rl import keyed_noise
from fmg.rl.keyed_noise import OBJECTIVE, ROLLOUT, NoiseKey

# Keeps the random windows apart from other draws of the same seed.
_WINDOW_STREAM = 0x77696E646F77


def rollout(
    flow_map: FlowMap,
    stochasticizer: Stochasticizer,
    cond: Conditioning,
    groups: Int[Tensor, " n"] | Sequence[int],
    grid: Sequence[float],
    *,
    seed: int,
    iteration: int = 0,
    latent_shape: Sequence[int],
    same_initial_noise: bool = False,
    stochastic_steps: Sequence[int] | None = None,
    members: Int[Tensor, " n"] | None = None,
    batch_size: int | None = None,
    device: torch.device | None = None,
) -> TransitionRollout:
    """Generates `n` samples and records every stochastic transition with its density.

    A grid of N intervals has at most N - 1 stochastic transitions; the last interval, to 0, is always a
    deterministic jump. Intervals left out of `stochastic_steps` are deterministic jumps too.

    Args:
        flow_map: the policy's map.
        stochasticizer: turns the map into a Gaussian over the next state.
        cond: conditioning, one row per sample.
        groups: prompt group of each sample; part of the noise key, so groups of one iteration need distinct indices.
        grid: strictly decreasing times, the first at most 1, the last 0.
        seed: seed of the run.
        iteration: training iteration, part of the noise key.
        latent_shape: shape of one latent.
        same_initial_noise: whether all members of a group start from the same noise.
        stochastic_steps: indices of the stochastic intervals, in [0, N - 2]; None means all of them.
        members: index of each sample within its group, part of the noise key; None counts the earlier samples of the
            same group. A process that generates a share of a rollout passes the indices in the whole rollout
            (`group_members`).
        batch_size: samples of a forward pass; the last chunk may be shorter. None takes all at once.
        device: where the states live; None takes the device of the conditioning, or the CPU if it has no tensor.

    Raises:
        UsageError: the grid has no stochastic interval, a step is out of range, or the number of rows is wrong.
        CompositionError: a single-time map would need a deterministic interior jump.
    """
    times = checked_grid(grid)
    stochastic = _checked_steps(stochastic_steps, len(times) - 1)
    index = torch.as_tensor(groups)
    keys = sample_keys(index, seed, iteration, members)
    place = device or device_of(cond)
    cond = cond.to(place)
    parts: list[tuple[Tensor, list[Transition]]] = []
    with torch.no_grad():
        for rows in _chunks(cond, keys, batch_size):
            draw = _noise_source([keys[i] for i in rows], latent_shape, same_initial_noise, place)
            parts.append(_draw_transitions(flow_map, stochasticizer, cond.select(rows), times, stochastic, draw))
    steps = zip(*(transitions for _, transitions in parts), strict=True)
    return TransitionRollout(
        cond=cond,
        groups=index,
        x0=torch.cat([x_0 for x_0, _ in parts]),
        grid=times,
        transitions=tuple(cat_transitions(step) for step in steps),
    )


def sample_rollout(
    flow_map: FlowMap,
    cond: Conditioning,
    groups: Int[Tensor, " n"] | Sequence[int],
    grid: Sequence[float],
    *,
    seed: int,
    iteration: int = 0,
    latent_shape: Sequence[int],
    same_initial_noise: bool = False,
    members: Int[Tensor, " n"] | None = None,
    starts: Int[Tensor, " n"] | None = None,
    batch_size: int | None = None,
    device: torch.device | None = None,
) -> SampleRollout:
    """Generates `n` samples with the map's own few-step sampler, without transitions; arguments as in `rollout`.

    Two-time maps are deterministic after the initial noise; single-time maps add keyed noise at interior times. With
    `starts`, the index of a grid interval for each sample, it is a `StateRollout` with the states that these start at.
    """
    times = checked_grid(grid)
    index = torch.as_tensor(groups)
    keys = sample_keys(index, seed, iteration, members)
    place = device or device_of(cond)
    cond = cond.to(place)
    parts: list[Tensor] = []
    kept: list[Tensor] = []
    for rows in _chunks(cond, keys, batch_size):
        draw = _noise_source([keys[i] for i in rows], latent_shape, same_initial_noise, place)

        def renoise(k: int, draw: Callable[[int], Tensor] = draw) -> Tensor:
            return draw(k + 1)

        with torch.no_grad():
            x_1 = state = draw(0)
            for k, x in enumerate(native_states(flow_map, cond.select(rows), x_1, times, renoise)):
                if starts is not None:
                    here = (starts[rows] == k).to(place)
                    state = torch.where(here.view(-1, *[1] * (x.ndim - 1)), x, state)
        parts.append(x)
        kept.append(state)
    x_0 = torch.cat(parts).float()
    if starts is None:
        return SampleRollout(cond, index, x_0, times)
    return StateRollout(cond, index, x_0, times, starts, torch.cat(kept).float())


def sample(
    flow_map: FlowMap,
    cond: Conditioning,
    x_1: Float[Tensor, "n *shape"],
    grid: Sequence[float],
    *,
    keys: Sequence[NoiseKey] = (),
    batch_size: int | None = None,
) -> Float[Tensor, "n *shape"]:
    """Generates `x_0` from given noise with the map's own few-step sampler, without gradients.

    Args:
        flow_map: the map.
        cond: conditioning, one row per row of `x_1`.
        x_1: standard normal noise, on the device of the map.
        grid: strictly decreasing times, the first at most 1, the last 0.
        keys: one key per row, which single-time maps need for more than one step: interval k uses the noise of step
            k + 1. Two-time maps ignore them.
        batch_size: rows of a forward pass; None takes all at once.

    Raises:
        UsageError: a single-time map gets no keys for a grid of several steps.
    """
    times = checked_grid(grid)
    if flow_map.anchors == "endpoint" and len(times) > 2 and len(keys) != len(x_1):
        raise UsageError(
            f"A single-time map needs noise at interior times, but got {len(keys)} noise keys for {len(x_1)} rows",
            "Give one key for each row, or a grid of one step.",
        )
    shape = x_1.shape[1:]
    parts: list[Tensor] = []
    for rows in row_chunks(len(x_1), batch_size):
        chosen = [keys[i] for i in rows] if keys else []

        def renoise(k: int, chosen: Sequence[NoiseKey] = chosen) -> Tensor:
            return noise([key._replace(step=k + 1) for key in chosen], shape).to(x_1.device)

        with torch.no_grad():
            parts.append(native_sample(flow_map, cond.select(rows), x_1[rows.to(x_1.device)], times, renoise))
    return torch.cat(parts)


def noise(keys: Sequence[NoiseKey], shape: Sequence[int], stream: str = ROLLOUT) -> Float[Tensor, "n *shape"]:
    """The noise of `fmg.rl.keyed_noise.normal` as a tensor, fp32 on the CPU."""
    return torch.from_numpy(keyed_noise.normal(keys, shape, stream))


def uniform(keys: Sequence[NoiseKey], stream: str = OBJECTIVE) -> Float[Tensor, " n"]:
    """The numbers of `fmg.rl.keyed_noise.uniform` as a tensor, fp32 on the CPU."""
    return torch.from_numpy(keyed_noise.uniform(keys, stream))


def sample_keys(
    groups: Int[Tensor, " n"], seed: int, iteration: int, members: Int[Tensor, " n"] | None = None
) -> list[NoiseKey]:
    """Keys of the initial noise of each sample; `members` as in `rollout`."""
    chosen = group_members(groups) if members is None else members
    pairs = zip(groups.tolist(), chosen.tolist(), strict=True)
    return [NoiseKey(seed, iteration, group, member, 0) for group, member in pairs]


def group_members(groups: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """For each sample, the number of earlier samples of its group."""
    seen: Counter[int] = Counter()
    members: list[int] = []
    for group in groups.tolist():
        members.append(seen[group])
        seen[group] += 1
    return torch.tensor(members, dtype=torch.int64)


def _draw_transitions(
    flow_map: FlowMap,
    stochasticizer: Stochasticizer,
    cond: Conditioning,
    times: tuple[float, ...],
    stochastic: frozenset[int],
    draw: Callable[[int], Tensor],
) -> tuple[Tensor, list[Transition]]:
    x = draw(0)
    transitions: list[Transition] = []
    for k, (t_value, s_value) in enumerate(pairwise(times)):
        t = torch.full((len(x),), t_value, device=x.device)
        s = torch.full((len(x),), s_value, device=x.device)
        if k not in stochastic:
            x = flow_map.jump(x, t, s, cond).float()
            continue
        density = stochasticizer.transition(flow_map, x, t, s, cond)
        x_s = density.push(draw(k + 1))
        transitions.append(Transition(k, t, s, x, x_s, density.mean, density.std, density.log_prob(x_s)))
        x = x_s
    return x, transitions


def _noise_source(
    keys: Sequence[NoiseKey], shape: Sequence[int], same_initial_noise: bool, device: torch.device
) -> Callable[[int], Tensor]:
    """The noise of a chunk as a function of the step."""

    def draw(step: int) -> Tensor:
        shared = same_initial_noise and step == 0
        at_step = [key._replace(step=step, member=0 if shared else key.member) for key in keys]
        return noise(at_step, shape).to(device)

    return draw


def device_of(cond: Conditioning) -> torch.device:
    """The device of a conditioning; the CPU if it has no tensors."""
    return next((tensor.device for tensor in cond.stored.values()), torch.device("cpu"))


def _chunks(cond: Conditioning, keys: Sequence[NoiseKey], batch_size: int | None) -> list[Tensor]:
    if len(cond) != len(keys) or not keys:
        raise UsageError(
            f"The conditioning has {len(cond)} rows for {len(keys)} samples",
            "Give one row of conditioning and one group index for each sample, and at least one sample.",
        )
    return row_chunks(len(keys), batch_size)


def row_chunks(count: int, batch_size: int | None) -> list[Tensor]:
    """Consecutive row indices, at most `batch_size` at a time."""
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"The rollout batch size is {batch_size}", "Give a batch size of at least 1.")
    return list(torch.split(torch.arange(count), batch_size or count))


def checked_grid(grid: Sequence[float]) -> tuple[float, ...]:
    """The times of a grid that decreases from at most 1 to 0.

    Raises:
        UsageError: it does not.
    """
    times = tuple(float(t) for t in grid)
    falling = all(t > s for t, s in pairwise(times))
    if len(times) < 2 or not falling or times[0] > 1.0 or times[-1] != 0.0:
        raise UsageError(
            f"The time grid {list(times)} is invalid", "Give strictly decreasing times from at most 1 to 0."
        )
    return times


def check_intervals(intervals: int) -> None:
    """Refuses a grid without a stochastic transition.

    Raises:
        UsageError: it has one interval.
    """
    if intervals < 2:
        raise UsageError(
            "A grid of one interval has no stochastic transition, since the step to 0 is deterministic",
            "Use at least 2 steps.",
        )


def _checked_steps(steps: Sequence[int] | None, intervals: int) -> frozenset[int]:
    check_intervals(intervals)
    chosen = frozenset(range(intervals - 1) if steps is None else steps)
    if not chosen or not chosen <= frozenset(range(intervals - 1)):
        raise UsageError(
            f"The stochastic steps {sorted(chosen)} do not fit a grid of {intervals} intervals",
            f"Give at least one index from 0 to {intervals - 2}.",
        )
    return chosen


def window_steps(window: WindowSection | None, steps: int, *, iteration: int, seed: int) -> tuple[int, ...]:
    """Indices of the stochastic grid intervals in one iteration (docs/math.md, eq. 28).

    `fixed` stays at its start. `random` begins at a random step from there on, the same for all samples, chosen anew
    every `every` iterations (Flow-GRPO-Fast). `progressive` moves by one step every `every` iterations, from noisy to
    clean, and stays at the last (MixGRPO, Li et al., arXiv 2507.21802, with stride 1 and a constant interval).

    Args:
        window: window of a valid recipe; None makes every interval except the last stochastic.
        steps: intervals of the grid, N; the last is always deterministic.
        iteration: training iteration, from 0.
        seed: seed of the run.

    Returns:
        Consecutive indices in [0, N - 2], in increasing order.
    """
    if window is None:
        return tuple(range(steps - 1))
    first = _first_step(window, steps - 1 - window.size, iteration // window.every, seed)
    return tuple(range(first, first + window.size))


def _first_step(window: WindowSection, last: int, moves: int, seed: int) -> int:
    if window.mode == "fixed":
        return window.start
    if window.mode == "random":
        return int(np.random.default_rng((seed, moves, _WINDOW_STREAM)).integers(window.start, last + 1))
    return min(window.start + moves, last)
