"""Adapters that turn a network into a flow map `X_{t->s}` (docs/math.md, eq. 5-8).

The network is called through its `__call__`, so that hooks of distributed wrappers fire, with times as `(b,)` fp32
tensors, so that bf16 never rounds a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CompositionError
from fmg.core.protocols import Anchors, FlowMap, MeanFlow, ProbabilityPath
from fmg.core.types import Conditioning
from fmg.flow.path import TrigPath, expand

TwoTimeNetwork = Callable[[Tensor, Tensor, Tensor, Conditioning], Tensor]
"""`(x_t, t, s, cond) -> u`, the average velocity between `s` and `t`."""

SingleTimeNetwork = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""`(x_t, t, cond) -> u`, the average velocity between 0 and `t`."""


@dataclass(frozen=True)
class TwoTimeMap:
    """`X_{t->s}(x) = x - (t - s) u(x, t, s)` for any `s` in [0, t] (eq. 6; MeanFlow, arXiv 2505.13447)."""

    network: TwoTimeNetwork
    path: ProbabilityPath

    anchors: ClassVar[Literal["any"]] = "any"

    def jump(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`X_{t->s}(x_t)`: one network evaluation, fp32 whatever the network computes in."""
        t, s = _full_precision(t), _full_precision(s)
        return x_t - expand(t - s, x_t) * self.network(x_t, t, s, cond)

    def velocity(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`v(x_t, t) = u(x_t, t, t)`, one network evaluation."""
        return self.average_velocity(x_t, t, t, cond)

    def average_velocity(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`u(x_t, t, s)`, one network evaluation."""
        return self.network(x_t, _full_precision(t), _full_precision(s), cond)


@dataclass(frozen=True)
class SingleTimeMap:
    """`X_{t->0}(x) = x - t net(x, t)`: consistency models in rectified-flow coordinates (eq. 7)."""

    network: SingleTimeNetwork
    path: ProbabilityPath

    anchors: ClassVar[Literal["endpoint"]] = "endpoint"

    def jump(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`X_{t->0}(x_t)`, one network evaluation.

        Raises:
            CompositionError: a target time is not 0. Not checked while a graph is traced.
        """
        _only_to_zero(s)
        t = _full_precision(t)
        return x_t - expand(t, x_t) * self.network(x_t, t, cond)

    def velocity(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """Not defined: the network only predicts the average velocity down to 0.

        Raises:
            CompositionError: always.
        """
        raise _no_velocity()


@dataclass(frozen=True)
class VelocityMap:
    """`X_{t->s}(x) = x - (t - s) v(x, t)` for any `s` in [0, t]: one Euler step of a distilled velocity sampler.

    Few-step students of distribution matching are sampled this way (FLUX.2 [klein], Z-Image-Turbo). The map to 0 is
    their prediction of the data; how far a jump to an interior time is from their own distribution is a question for
    the path check.
    """

    network: SingleTimeNetwork
    path: ProbabilityPath

    anchors: ClassVar[Literal["any"]] = "any"

    def jump(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`X_{t->s}(x_t)`: one network evaluation, fp32 whatever the network computes in."""
        t, s = _full_precision(t), _full_precision(s)
        return x_t - expand(t - s, x_t) * self.network(x_t, t, cond)

    def velocity(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`v(x_t, t)`, one network evaluation."""
        return self.network(x_t, _full_precision(t), cond)


@dataclass(frozen=True)
class TrigFlowMap:
    """`X_{t->0}(x) = cos x - sin F(x)` on the trig path, `F` from a rectified-flow network (eq. 8; SANA-Sprint).

    The state `x = cos x_0 + sin eps` has unit data, so `sigma_data` is gone. The network gets `z = x r` at the
    rectified-flow time `sin / (sin + cos)`, and the wrapper cancels to `z - sin / (sin + cos) net(z)`.
    """

    network: SingleTimeNetwork
    path: TrigPath = field(default_factory=TrigPath)

    anchors: ClassVar[Literal["endpoint"]] = "endpoint"

    def jump(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`X_{t->0}(x_t)`, one network evaluation.

        Raises:
            CompositionError: a target time is not 0. Not checked while a graph is traced.
        """
        _only_to_zero(s)
        sine, cosine = self.path.sigma(t), self.path.alpha(t)
        time = sine / (sine + cosine)
        z = x_t / expand(sine + cosine, x_t)
        return z - expand(time, x_t) * self.network(z, time, cond)

    def velocity(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """Not defined, as for `SingleTimeMap`.

        Raises:
            CompositionError: always.
        """
        raise _no_velocity()


class PaddedBatches:
    """A flow map that pads a short batch with its last row, so that kernels always see one shape.

    Matrix products of a different size sum in a different order. In bf16 that moves a log-prob by more than a tenth of
    a clip range, so the last, shorter micro-batch of a rollout or an update would not replay to ratio 1.

    Args:
        inner: the map.
        rows: gives the number of rows to pad a batch of some size to; None, or a number no larger than the size, leaves
            the batch unchanged.
    """

    def __init__(self, inner: FlowMap, rows: Callable[[int], int | None]) -> None:
        self._inner = inner
        self._rows = rows

    @property
    def anchors(self) -> Anchors:
        return self._inner.anchors

    @property
    def path(self) -> ProbabilityPath:
        return self._inner.path

    def jump(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`X_{t->s}(x_t)`."""
        return self._padded(self._inner.jump, cond, x_t, t, s)

    def velocity(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`v(x_t, t)`."""
        return self._padded(self._inner.velocity, cond, x_t, t)

    def average_velocity(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`u(x_t, t, s)`.

        Raises:
            CompositionError: the inner map is not a two-time map.
        """
        return self._padded(mean_flow(self._inner).average_velocity, cond, x_t, t, s)

    def _padded(self, call: Callable[..., Tensor], cond: Conditioning, x_t: Tensor, *times: Tensor) -> Tensor:
        given, rows = len(x_t), self._rows(len(x_t))
        if rows is None or not 0 < given < rows:
            return call(x_t, *times, cond)
        index = torch.arange(rows, device=x_t.device).clamp(max=given - 1)
        return call(x_t[index], *(t[index] for t in times), cond.select(index))[:given]


def mean_flow(flow_map: FlowMap) -> MeanFlow:
    """The map as one with an average velocity.

    Raises:
        CompositionError: it has none.
    """
    if not isinstance(flow_map, MeanFlow):
        raise CompositionError(
            "The map has no average velocity u(x, t, s) to arbitrary target times",
            "Use a two-time (MeanFlow) model, or an objective that needs none, such as diffusion-nft.",
        )
    return flow_map


def _only_to_zero(s: Tensor) -> None:
    if not torch.compiler.is_compiling() and bool((s != 0).any()):
        raise CompositionError(
            f"A single-time map jumps to 0 only, not to {s.max().item():g}",
            "Use the stochasticizer 'asfmc-endpoint' or a two-time model.",
        )


def _no_velocity() -> CompositionError:
    return CompositionError(
        "A single-time map has no diagonal velocity", "Use the stochasticizer 'asfmc-endpoint' or a two-time model."
    )


def _full_precision(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
