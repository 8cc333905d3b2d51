"""Rollouts of the conformance kit's network, small enough to differentiate by hand: two parameters per coordinate."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fmg.conformance.toys import GRID, SHAPE, Network, SingleTimeNetwork, ToyPolicies
from fmg.core.protocols import FlowMap, Stochasticizer
from fmg.core.types import Conditioning, RewardOutput, ScoredRollout, TransitionRollout
from fmg.flow import LinearPath, SingleTimeMap, TwoTimeMap
from fmg.registry import stochasticizers
from fmg.rl import group_advantages, rollout


def two_time() -> tuple[Network, TwoTimeMap]:
    network = Network()
    return network, TwoTimeMap(network, LinearPath())


def single_time() -> tuple[Network, SingleTimeMap]:
    network = SingleTimeNetwork()
    return network, SingleTimeMap(network, LinearPath())


def policies(network: nn.Module, make: type[TwoTimeMap] | type[SingleTimeMap] = TwoTimeMap) -> ToyPolicies:
    """`current` is the network itself, `old` and `reference` are copies of it."""
    old, reference = copy.deepcopy(network), copy.deepcopy(network)
    path = LinearPath()
    return ToyPolicies(make(network, path), make(old, path), make(reference, path))


def stochasticizer(name: str = "asfmc", **options: object) -> Stochasticizer:
    return stochasticizers.build(name, options or ({"ratio": 0.5} if name == "asfmc" else {}))


def grouped(groups: int, size: int) -> tuple[Conditioning, Tensor]:
    prompts = tuple(f"prompt {g}" for g in range(groups) for _ in range(size))
    return Conditioning(prompts, {}), torch.arange(groups).repeat_interleave(size)


def drawn(flow_map: FlowMap, groups: int = 4, size: int = 6, seed: int = 7) -> TransitionRollout:
    cond, index = grouped(groups, size)
    return rollout(flow_map, stochasticizer(), cond, index, GRID, seed=seed, latent_shape=SHAPE)


def scored(drawn: TransitionRollout, rewards: Sequence[float] | Tensor) -> ScoredRollout:
    values = torch.as_tensor(rewards, dtype=torch.float32)
    advantages = group_advantages(values, drawn.groups, global_std=True)
    return ScoredRollout(drawn, RewardOutput(values, {}), advantages)


def preference(drawn: TransitionRollout) -> Tensor:
    """A reward that differs within every group: the mean of the sample."""
    return drawn.x0.flatten(1).mean(1)
