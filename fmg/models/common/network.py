"""A transformer as a plain function of latents, times and conditioning, as the maps of `fmg.flow` take it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.protocols import FlowMap
from fmg.core.types import Conditioning
from fmg.flow import SingleTimeMap, TrigFlowMap, TwoTimeMap, VelocityMap, path_by_name
from fmg.models.common.policy_weights import Scope
from fmg.models.conventions import FlowMapConventions

Network = Callable[..., Any]
"""The transformer, a stand-in with its call signature, or a `LatentCall`."""


class LatentCall(ABC):
    """A replacement for a whole `LatentNetwork`: it takes latents rather than a family's tokens."""

    @abstractmethod
    def __call__(
        self,
        x: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"] | None,
        guidance: Float[Tensor, " b"] | None,
        cond: Conditioning,
    ) -> Float[Tensor, "b c h w"]:
        """The prediction of the network; `s` and `guidance` are None if it does not take them."""


class LatentNetwork(ABC):
    """`u(x, t, s, cond)` or `net(x, t, cond)` on latents (b, c, h, w), in the direction of noise.

    A family implements `_call`: latents enter the transformer in `self._dtype`, times stay fp32 to their sinusoids, and
    the transformer is called as a module, so that the hooks of DDP, FSDP2 and PEFT fire.

    Args:
        transformer: the module of diffusers, or a wrapper with its call signature.
        dtype: dtype of the latents that the transformer takes.
        guidance: embedded guidance scale as the transformer takes it, for all rows or per row (b,); None for weights
            without a guidance embedding.
        scope: context in which every call of the transformer runs.
    """

    def __init__(
        self,
        transformer: Network,
        dtype: torch.dtype,
        guidance: float | Tensor | None = None,
        scope: Scope = nullcontext,
    ) -> None:
        self._transformer = transformer
        self._dtype = dtype
        self._guidance = guidance
        self._scope = scope
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def within(self, scope: Scope, transformer: Network | None = None) -> Self:
        """The same network with calls in another context, and through `transformer` if given."""
        other = copy.copy(self)
        other._scope = scope
        other._transformer = transformer or self._transformer
        return other

    def two_time(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Average velocity from `t` to `s`; the velocity for `s = t`."""
        with self._scope():
            return self._predict(x, t.float(), s.float(), cond)

    def single_time(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """The prediction at `t`: the average velocity from `t` to 0, or the velocity."""
        with self._scope():
            return self._predict(x, t.float(), None, cond)

    def _placed(self, key: tuple[object, ...], device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """The result of `make` on `device`, computed once per key."""
        if torch.compiler.is_exporting():
            # a cached value is of no use in a graph, and would outlive the trace
            return make().to(device)
        place = (*key, device)
        if place not in self._kept:
            self._kept[place] = make().to(device)
        return self._kept[place]

    def _guidances(self, t: Tensor) -> Tensor | None:
        """The guidance scale of each row (b,), if the weights embed one."""
        if self._guidance is None or isinstance(self._guidance, Tensor):
            return self._guidance
        return torch.full_like(t, self._guidance)

    def _predict(self, x: Tensor, t: Tensor, s: Tensor | None, cond: Conditioning) -> Tensor:
        if isinstance(self._transformer, LatentCall):
            return self._transformer(x, t, s, self._guidances(t), cond).float()
        return self._call(x, t, s, cond).float()

    @abstractmethod
    def _call(self, x: Tensor, t: Tensor, s: Tensor | None, cond: Conditioning) -> Tensor:
        """One forward pass; `s` is None for a map without a second time."""


def map_of(network: LatentNetwork, conventions: FlowMapConventions) -> FlowMap:
    """The flow map of a network with these conventions."""
    path = path_by_name(conventions.path)
    if conventions.map == "two-time":
        return TwoTimeMap(network.two_time, path)
    if conventions.map == "velocity":
        return VelocityMap(network.single_time, path)
    if conventions.path == "trig":
        return TrigFlowMap(network.single_time)
    return SingleTimeMap(network.single_time, path)
