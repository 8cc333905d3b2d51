"""Branched rollouts: a group is a star, the siblings of one transition from one state (docs/branching.md).

A flow map jumps from any state to the image in one call. So a group needs one short prefix, one density, and one
completion per sibling, where a chain runs the whole sampler per sample. The density belongs to the whole group, so an
update replays one row per group (docs/math.md, eq. 30-34).

TempFlow-GRPO (arXiv 2508.04324) and BranchGRPO (arXiv 2509.06040) branch velocity samplers and pay for the remaining
ODE steps; neither shares the trained row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.core.protocols import FlowMap, Stochasticizer
from fmg.core.types import BranchRollout, Conditioning
from fmg.flow.sampling import native_step
from fmg.rl.advantages import unequal_groups
from fmg.rl.keyed_noise import NoiseKey
from fmg.rl.replay import log_probs
from fmg.rl.rollouts import check_intervals, checked_grid, device_of, noise, row_chunks

Completion = Literal["jump", "grid"]
Prefix = Literal["native", "stochastic"]
StepRule = Literal["first", "cycle", "random", "adaptive"]

# Keeps the choice of steps apart from other draws of the same seed.
_STREAM = 0x6272616E6368
# Weight of the past in the running mean of a step's reward std.
_MEMORY = 0.8


@dataclass(frozen=True)
class Branching:
    """How the groups of a rollout branch.

    Attributes:
        size: siblings of a group, at least 2.
        completion: how siblings reach 0: in one jump, or along the rest of the grid with the map's own sampler.
        prefix: how groups reach the branching state: with the map's own sampler, or with the stochasticizer.
        antithetic: whether siblings `2 i` and `2 i + 1` have opposite noise.
    """

    size: int
    completion: Completion = "jump"
    prefix: Prefix = "native"
    antithetic: bool = False

    def __post_init__(self) -> None:
        if self.size < 2 or (self.antithetic and self.size % 2):
            raise UsageError(
                f"A group of {self.size} siblings cannot be compared" + (" in pairs" if self.antithetic else ""),
                "Use an even number of siblings, at least 2." if self.antithetic else "Use at least 2 siblings.",
            )


def branch_rollout(
    flow_map: FlowMap,
    stochasticizer: Stochasticizer,
    cond: Conditioning,
    groups: Int[Tensor, " g"] | Sequence[int],
    steps: Int[Tensor, " g"] | Sequence[int],
    grid: Sequence[float],
    how: Branching,
    *,
    seed: int,
    iteration: int = 0,
    latent_shape: Sequence[int],
    batch_size: int | None = None,
    device: torch.device | None = None,
    completing: FlowMap | None = None,
    span: tuple[int, int] | None = None,
) -> BranchRollout:
    """Generates `g` groups of siblings, without gradients.

    Noise is keyed as in `fmg.rl.rollout`: what a group shares (initial noise, prefix) has member 0, and sibling `i` of
    a group that branches at step `k` has the noise of member `i` and step `k`. With the completion `grid` and a
    two-time map, a group equals, bit for bit, a chain with one initial noise whose only stochastic step is `k`.

    Args:
        flow_map: the policy's map.
        stochasticizer: turns the map into the density of the transition.
        cond: conditioning, one row per group.
        groups: index of each group, part of the noise key.
        steps: grid interval at which each group branches, in [0, N - 2] for a grid of N intervals.
        grid: strictly decreasing times, the first at most 1, the last 0.
        how: siblings, completion and prefix.
        seed, iteration, latent_shape, device: as in `fmg.rl.rollout`.
        batch_size: samples of a forward pass; a chunk contains whole groups. None takes all at once.
        completing: map that completes the siblings; may be compiled, exported or in another precision, since
            completions have no density. None takes `flow_map`.
        span: lowest and highest step over the groups of all processes: each then makes the calls of this span, with an
            arbitrary row where its own groups have none, since a sharded network needs all processes at every call.
            None makes only the calls that have rows.

    Raises:
        UsageError: the grid has no stochastic interval, a step is out of range, or the number of rows is wrong.
    """
    times = checked_grid(grid)
    index, step = torch.as_tensor(groups), torch.as_tensor(steps)
    _check_steps(step, len(times) - 1)
    if not len(index) or not len(cond) == len(index) == len(step):
        raise UsageError(
            f"There are {len(cond)} rows of conditioning and {len(step)} steps for {len(index)} groups",
            "Give one row and one step for each group, and at least one group.",
        )
    place = device or device_of(cond)
    cond = cond.to(place)
    size = None if batch_size is None else max(1, batch_size // how.size)
    parts: list[BranchRollout] = []
    with torch.no_grad():
        for rows in row_chunks(len(index), size):
            stars = _Stars(
                flow_map, stochasticizer, cond.select(rows), step[rows], times, tuple(latent_shape), how, place, span,
                [NoiseKey(seed, iteration, group, 0, 0) for group in index[rows].tolist()],
            )  # fmt: skip
            parts.append(stars.roll(index[rows], completing or flow_map, batch_size))
    return cat_branches(parts, cond)


def cat_branches(parts: Sequence[BranchRollout], cond: Conditioning) -> BranchRollout:
    """Concatenates chunks of groups; `cond` has one row for each group of all chunks."""
    size = parts[0].x_s.shape[1]
    names = ("groups", "x0", "step", "t", "s", "x_t", "mean", "std", "x_s", "log_prob")
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return BranchRollout(cond=siblings_of(cond, size), grid=parts[0].grid, **columns)


def siblings_of(cond: Conditioning, size: int) -> Conditioning:
    """Repeats every row `size` times: the conditioning of the samples of a rollout, group-major."""
    return cond.select(torch.arange(len(cond)).repeat_interleave(size))


@dataclass(frozen=True)
class _Stars:
    """A chunk of groups on their way from noise to images."""

    flow_map: FlowMap
    stochasticizer: Stochasticizer
    cond: Conditioning
    step: Int[Tensor, " g"]
    times: tuple[float, ...]
    shape: tuple[int, ...]
    how: Branching
    device: torch.device
    span: tuple[int, int] | None
    keys: Sequence[NoiseKey]

    def roll(self, groups: Int[Tensor, " g"], completing: FlowMap, batch_size: int | None) -> BranchRollout:
        times = torch.tensor(self.times, dtype=torch.float32, device=self.device)
        step = self.step.to(self.device)
        t, s = times[step], times[step + 1]
        x_t = self._prefix(self._noise(range(len(self.keys)), 0, None))
        density = self.stochasticizer.transition(self.flow_map, x_t, t, s, self.cond)
        x_s = torch.stack([density.push(xi) for xi in self._sibling_noise()], dim=1)
        return BranchRollout(
            cond=self.cond,
            groups=groups.repeat_interleave(self.how.size),
            x0=self._completed(x_s.flatten(0, 1), completing, batch_size),
            grid=self.times,
            step=self.step,
            t=t,
            s=s,
            x_t=x_t,
            mean=density.mean,
            std=density.std,
            x_s=x_s,
            log_prob=log_probs(density, x_s),
        )

    def _prefix(self, x: Float[Tensor, "g *shape"]) -> Float[Tensor, "g *shape"]:
        """Advances each group to its own branching time."""
        x = x.clone()
        for j in range(int(self.step.max()) if self.span is None else self.span[1]):
            active = (self.step > j).nonzero().squeeze(1)
            rows = active if len(active) else torch.zeros(1, dtype=torch.int64)
            here, cond = rows.to(self.device), self.cond.select(rows)
            t, s = self.times[j], self.times[j + 1]

            def renoise(j: int = j, rows: Tensor = rows) -> Tensor:
                return self._noise(rows.tolist(), j + 1, None)

            if self.how.prefix == "native":
                after = native_step(self.flow_map, cond, x[here], t, s, renoise).float()
            else:
                t_rows, s_rows = (torch.full((len(rows),), time, device=x.device) for time in (t, s))
                after = self.stochasticizer.transition(self.flow_map, x[here], t_rows, s_rows, cond).push(renoise())
            if len(active):
                x[here] = after
        return x

    def _completed(
        self, x_s: Float[Tensor, "n *shape"], flow_map: FlowMap, batch_size: int | None
    ) -> Float[Tensor, "n *shape"]:
        cond, steps = siblings_of(self.cond, self.how.size), self.step.repeat_interleave(self.how.size)
        done = []
        for rows in row_chunks(len(x_s), batch_size):
            x, part, step = x_s[rows.to(self.device)], cond.select(rows), steps[rows]
            if self.how.completion == "jump":
                s = torch.tensor(self.times, dtype=torch.float32, device=self.device)[step.to(self.device) + 1]
                x = flow_map.jump(x, s, torch.zeros_like(s), part)
            else:
                x = self._along_the_grid(x, flow_map, part, rows, step)
            done.append(x.float())
        return torch.cat(done)

    def _along_the_grid(
        self, x: Tensor, flow_map: FlowMap, cond: Conditioning, rows: Tensor, step: Tensor
    ) -> Float[Tensor, "k *shape"]:
        x = x.clone()
        lowest = int(step.min()) if self.span is None else self.span[0]
        for j in range(lowest + 1, len(self.times) - 1):
            active = (step < j).nonzero().squeeze(1)
            chosen = active if len(active) else torch.zeros(1, dtype=torch.int64)
            here = chosen.to(self.device)

            def renoise(j: int = j, chosen: Tensor = chosen) -> Tensor:
                sample = rows[chosen]
                stars, members = (sample // self.how.size).tolist(), (sample % self.how.size).tolist()
                return self._noise(stars, j + 1, members)

            t, s = self.times[j], self.times[j + 1]
            after = native_step(flow_map, cond.select(chosen), x[here], t, s, renoise).float()
            if len(active):
                x[here] = after
        return x

    def _sibling_noise(self) -> Sequence[Float[Tensor, "g *shape"]]:
        """The noise of each sibling in turn, for all groups at once."""

        def drawn(member: int) -> Tensor:
            keys = [
                key._replace(member=member, step=k + 1) for key, k in zip(self.keys, self.step.tolist(), strict=True)
            ]
            return noise(keys, self.shape).to(self.device)

        if not self.how.antithetic:
            return [drawn(member) for member in range(self.how.size)]
        return [sign * xi for xi in map(drawn, range(0, self.how.size, 2)) for sign in (1.0, -1.0)]

    def _noise(self, stars: Sequence[int], step: int, members: Sequence[int] | None) -> Float[Tensor, "k *shape"]:
        chosen = members or [0] * len(stars)
        keys = [self.keys[i]._replace(member=member, step=step) for i, member in zip(stars, chosen, strict=True)]
        return noise(keys, self.shape).to(self.device)


@dataclass
class StepChooser:
    """Chooses the transition at which each group of an iteration branches (docs/branching.md).

    `adaptive` gives a transition groups in proportion to the square of the running mean of its siblings' reward std,
    and at least the share `floor`: if siblings get equal rewards, there is nothing to learn. Its state is part of a
    run's state.

    Attributes:
        rule: `first`, `cycle`, `random` or `adaptive`.
        transitions: stochastic transitions of the grid, N - 1.
        floor: minimum share of the groups for every transition under `adaptive`.
        seed: seed of the run.
    """

    rule: StepRule
    transitions: int
    floor: float
    seed: int
    _std: dict[int, float] = field(default_factory=dict, init=False)

    def choose(self, iteration: int, groups: int) -> Int[Tensor, " g"]:
        """The step of each group; depends on seed, iteration and, for `adaptive`, on earlier rewards."""
        if self.rule == "first":
            return torch.zeros(groups, dtype=torch.int64)
        if self.rule == "cycle":
            return (iteration * groups + torch.arange(groups)) % self.transitions
        draw = np.random.default_rng((self.seed, iteration, _STREAM))
        if self.rule == "random":
            return torch.from_numpy(draw.integers(0, self.transitions, groups))
        # systematic sampling: every transition gets its share, rounded up or down
        at = (np.arange(groups) + draw.random()) / groups
        edges = np.cumsum(self.shares())
        chosen = np.searchsorted(edges[:-1], at, side="right")
        return torch.from_numpy(draw.permutation(chosen)).long()

    def shares(self) -> list[float]:
        """Share of the groups that each transition gets under `adaptive`; equal until all have been seen."""
        if len(self._std) < self.transitions:
            return [1 / self.transitions] * self.transitions
        weights = [self._std[k] ** 2 for k in range(self.transitions)]
        total = sum(weights)
        floor = min(self.floor, 1 / self.transitions)
        if not total > 0:
            return [1 / self.transitions] * self.transitions
        return [floor + (1 - floor * self.transitions) * weight / total for weight in weights]

    def learn(self, std_by_step: Mapping[int, float]) -> None:
        """Records the mean within-group std of the rewards by transition."""
        for step, std in std_by_step.items():
            before = self._std.get(step)
            self._std[step] = std if before is None else _MEMORY * before + (1 - _MEMORY) * std

    def state(self) -> dict[str, float]:
        return {str(step): std for step, std in sorted(self._std.items())}

    def restore(self, state: Mapping[str, float]) -> None:
        """Restores what `state` returned."""
        self._std = {int(step): float(std) for step, std in state.items()}


def reward_spread(rewards: Float[Tensor, " n"], step: Int[Tensor, " g"]) -> tuple[dict[int, float], dict[int, float]]:
    """By transition: mean std of rewards within its groups (divisor m), and share of groups with equal rewards.

    Args:
        rewards: rewards of all samples, group-major; NaN where an image has no score.
        step: transition of each group.
    """
    by_group = rewards.double().reshape(len(step), -1)
    std = by_group.std(dim=1, correction=0)
    equal = (~unequal_groups(rewards, torch.arange(len(step)).repeat_interleave(by_group.shape[1]))).double()
    scored = std.isfinite()
    found = [int(k) for k in torch.unique(step[scored])]
    picked = {k: scored & (step == k) for k in found}
    return (
        {k: float(std[rows].mean()) for k, rows in picked.items()},
        {k: float(equal[rows].mean()) for k, rows in picked.items()},
    )


def within_correlation(one: Float[Tensor, " n"], other: Float[Tensor, " n"], size: int) -> float | None:
    """Pearson correlation of two rewards of the same samples within their groups of `size`.

    A group with an unscored image (NaN) is left out. None if no group is left, or if one of the rewards is constant
    within every group.
    """
    a, b = (x.double().cpu().reshape(-1, size) for x in (one, other))
    scored = (a.isfinite() & b.isfinite()).all(1)
    a, b = a[scored], b[scored]
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if bool(scale > 0) else None


def _check_steps(step: Int[Tensor, " g"], intervals: int) -> None:
    check_intervals(intervals)
    if len(step) and not 0 <= int(step.min()) <= int(step.max()) <= intervals - 2:
        raise UsageError(
            f"Branching steps from {int(step.min())} to {int(step.max())} do not fit a grid of {intervals} intervals",
            f"Give indices from 0 to {intervals - 2}.",
        )
