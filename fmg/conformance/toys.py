"""Small maps of known behaviour: exact ones of a Gaussian, and a network with parameters that counts its calls."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fmg.core.protocols import FlowMap
from fmg.core.types import BranchRollout, Conditioning, RewardOutput, SampleRollout, ScoredRollout, TransitionRollout
from fmg.flow import AffinePath, GaussianMap, LinearPath, SingleTimeMap, TrigPath, TwoTimeMap
from fmg.registry import stochasticizers
from fmg.rl import group_advantages, rollout, sample_rollout
from fmg.rl.branches import Branching, branch_rollout

SHAPE = (2, 3)
GRID = (1.0, 0.75, 0.5, 0.25, 0.0)
GROUPS, SIZE = 4, 6
PATHS: dict[str, AffinePath] = {"linear": LinearPath(), "trig": TrigPath()}


class Network(nn.Module):
    """`scale x + shift + 0.3 (t + s)`, coordinate by coordinate; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.2, 0.7, 6).reshape(SHAPE))
        self.shift = nn.Parameter(torch.linspace(-0.4, 0.4, 6).reshape(SHAPE))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
        self.calls += 1
        return self.scale * x + self.shift + 0.3 * (t + s)[:, None, None]


class SingleTimeNetwork(Network):
    """The same map without a second time."""

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, torch.zeros_like(t), cond)


@dataclass(frozen=True)
class ToyPolicies:
    """`current` is a network, `old` and `reference` are copies of it."""

    current: FlowMap
    old: FlowMap
    reference: FlowMap


def network_map(anchors: Literal["endpoint", "any"], path: str) -> tuple[Network, FlowMap]:
    """A network with parameters, and the map that it is."""
    if anchors == "any":
        network = Network()
        return network, TwoTimeMap(network, PATHS[path])
    single = SingleTimeNetwork()
    return single, SingleTimeMap(single, PATHS[path])


def policies() -> tuple[Network, ToyPolicies]:
    """A two-time network on the linear path and its policies."""
    network, current = network_map("any", "linear")
    old, reference = (TwoTimeMap(copy.deepcopy(network), LinearPath()) for _ in range(2))
    return network, ToyPolicies(current, old, reference)


def gaussian_map(path: str) -> GaussianMap:
    """The exact map of two correlated coordinates."""
    covariance = torch.tensor([[0.6, 0.25], [0.25, 0.3]], dtype=torch.float64)
    return GaussianMap(torch.tensor([0.8, -1.5], dtype=torch.float64), covariance, PATHS[path])


def unconditional(rows: int) -> Conditioning:
    """No condition."""
    return Conditioning(("",) * rows, {})


def states(rows: int, seed: int = 0) -> Float[Tensor, "b 2 3"]:
    """Noise of the network's shape."""
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


def toy_images(latents: Float[Tensor, "b 2 3"]) -> Float[Tensor, "b 3 2 1"]:
    """Images in [0, 1] of the network's latents."""
    return latents.mT.sigmoid()[..., None]


def toy_scores(images: Float[Tensor, "b 3 2 1"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
    """A smooth score, different for every image."""
    return (images * torch.linspace(-1, 2, 6, dtype=images.dtype).reshape(3, 2, 1)).square().flatten(1).sum(1)


RolloutKind = Literal["chain", "branch", "states"]


def scored_rollout(flow_map: FlowMap, kind: RolloutKind = "chain", *, equal_rewards: bool = False) -> ScoredRollout:
    """A rollout with a reward that differs within every group, or with none that does.

    A branched one has groups at every step of the grid. A `StateRollout` keeps the states before the last interval.
    """
    kernel = stochasticizers.build("asfmc", {"ratio": 0.5})
    index = torch.arange(GROUPS).repeat_interleave(SIZE)
    sampled: TransitionRollout | BranchRollout | SampleRollout
    if kind == "states":
        last, cond = torch.full((len(index),), len(GRID) - 2), unconditional(len(index))
        sampled = sample_rollout(flow_map, cond, index, GRID, seed=7, latent_shape=SHAPE, starts=last)
    elif kind == "branch":
        steps = torch.arange(GROUPS) % (len(GRID) - 2)
        how, cond = Branching(SIZE), unconditional(GROUPS)
        sampled = branch_rollout(flow_map, kernel, cond, range(GROUPS), steps, GRID, how, seed=7, latent_shape=SHAPE)
    else:
        sampled = rollout(flow_map, kernel, unconditional(len(index)), index, GRID, seed=7, latent_shape=SHAPE)
    values = torch.ones(len(index)) if equal_rewards else sampled.x0.flatten(1).mean(1)
    return ScoredRollout(sampled, RewardOutput(values, {}), group_advantages(values, index))
