"""Anchored stochastic flow map composition: jump to an anchor, then resample forward (docs/math.md, eq. 11-13).

Flow-Map GRPO, arXiv 2607.00535 (which runs time the other way).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.protocols import FlowMap
from fmg.core.types import Conditioning
from fmg.flow.gaussian import Gaussian
from fmg.flow.path import expand
from fmg.registry import stochasticizers
from fmg.stochasticizers.configs import LARGEST_SHARE, AsfmcConfig, AsfmcEndpointConfig
from fmg.stochasticizers.guards import step_times


@stochasticizers.register("asfmc", AsfmcConfig)
@dataclass(frozen=True)
class Asfmc:
    """`x_s ~ N((alpha_s / alpha_a) X_{t->a}(x_t), sigma_s^2 (1 - m^2) I)` with an anchor `a` in [0, s] (eq. 11).

    For an exact map `X_{t->a}(x_t) ~ p_a`, so `x_s ~ p_s`: the path is preserved for every anchor, with one network
    call and no small-step limit.
    """

    config: AsfmcConfig

    @property
    def path_preserving(self) -> bool:
        """True."""
        return True

    @property
    def exact(self) -> bool:
        """True: no expansion in the step size."""
        return True

    def transition(
        self,
        flow_map: FlowMap,
        x_t: Float[Tensor, "b *shape"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        cond: Conditioning,
    ) -> Gaussian:
        """The density of `x_s` given `x_t`, for `0 < s < t <= 1`; one call of a two-time map.

        Raises:
            ValueError: times of another shape or order.
            CompositionError: from a single-time map.
        """
        t, s = step_times(t, s)
        a = self.anchor(flow_map, t, s)
        scale, std = flow_map.path.kernel(a, s)
        return Gaussian(expand(scale, x_t) * flow_map.jump(x_t, t, a, cond), std)

    def anchor(self, flow_map: FlowMap, t: Float[Tensor, " b"], s: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The anchor `a` of every row under the rule of the config (eq. 12)."""
        rule, value = self.config.anchor
        if rule == "gap":
            return (s - value).clamp_min(0)
        if rule == "ratio":
            return value * s
        if rule == "hold":
            path = flow_map.path
            # rho(s) / rho(t), which is 0 at t = 1
            ratio = path.sigma(s) * path.alpha(t) / (path.alpha(s) * path.sigma(t))
            return path.anchor((ratio**value**2).clamp_max(LARGEST_SHARE), s)
        return flow_map.path.anchor(torch.full_like(s, value), s)


@stochasticizers.register("asfmc-endpoint", AsfmcEndpointConfig)
@dataclass(frozen=True)
class AsfmcEndpoint:
    """`x_s ~ N(alpha_s X_{t->0}(x_t), lambda^2 sigma_s^2 I)`: the anchor at the clean endpoint (eq. 13).

    At `lambda = 1` this is multistep consistency sampling (Song et al. 2023, arXiv 2303.01469) as a policy. A smaller
    `lambda`, the only noise dial of a single-time map, leaves the path (FlowMap-OPD sweeps it).
    """

    config: AsfmcEndpointConfig

    @property
    def path_preserving(self) -> bool:
        """True at full noise only."""
        return self.config.noise_level == 1

    @property
    def exact(self) -> bool:
        """True: no expansion in the step size."""
        return True

    def transition(
        self,
        flow_map: FlowMap,
        x_t: Float[Tensor, "b *shape"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        cond: Conditioning,
    ) -> Gaussian:
        """The density of `x_s` given `x_t`, for `0 < s < t <= 1`; one call of any map.

        Raises:
            ValueError: times of another shape or order.
        """
        t, s = step_times(t, s)
        endpoint = torch.zeros_like(s)
        scale, std = flow_map.path.kernel(endpoint, s)
        return Gaussian(expand(scale, x_t) * flow_map.jump(x_t, t, endpoint, cond), self.config.noise_level * std)
