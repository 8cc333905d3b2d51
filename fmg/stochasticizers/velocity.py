"""Baselines that sample with the diagonal velocity `v(x, t) = u(x, t, t)` (docs/math.md, eq. 15-17).

All are discretisations of a stochastic differential equation, or close to one: at 4 or 5 steps they leave the
probability path. Linear path only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.protocols import FlowMap
from fmg.core.types import Conditioning
from fmg.flow.gaussian import Gaussian, UnscaledGaussian
from fmg.flow.path import expand
from fmg.registry import stochasticizers
from fmg.stochasticizers.configs import CpsConfig, DanceSdeConfig, FlowSdeConfig
from fmg.stochasticizers.guards import require_linear, step_times


@stochasticizers.register("flow-sde", FlowSdeConfig)
@dataclass(frozen=True)
class FlowSde:
    """Flow-GRPO (arXiv 2505.05470): Euler-Maruyama with `eta_t = k sqrt(t / (1 - t))` (eq. 15).

    At `t = 1` the denominator takes the next grid time, as its code does.
    """

    config: FlowSdeConfig

    @property
    def path_preserving(self) -> bool:
        """False at any finite number of steps."""
        return False

    @property
    def exact(self) -> bool:
        """False: first order in the step."""
        return False

    def transition(
        self,
        flow_map: FlowMap,
        x_t: Float[Tensor, "b *shape"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        cond: Conditioning,
    ) -> Gaussian:
        """The density of `x_s` given `x_t`, for `0 < s < t <= 1`; one velocity call.

        Raises:
            ValueError: times of another shape or order.
            CompositionError: another path than the linear one, or a single-time map.
        """
        require_linear(flow_map, "flow-sde")
        t, s = step_times(t, s)
        v = flow_map.velocity(x_t, t, cond)
        dt = s - t
        eta = self.config.noise_level * (t / (1 - torch.where(t == 1, s, t))).sqrt()
        drift = eta.square() / (2 * t)
        mean = x_t * expand(1 + drift * dt, x_t) + v * expand((1 + drift * (1 - t)) * dt, x_t)
        return Gaussian(mean, eta * (-dt).sqrt())


@stochasticizers.register("dance-sde", DanceSdeConfig)
@dataclass(frozen=True)
class DanceSde:
    """DanceGRPO (arXiv 2505.07818): constant diffusion `eta`, with the score of the denoised estimate (eq. 16)."""

    config: DanceSdeConfig

    @property
    def path_preserving(self) -> bool:
        """False at any finite number of steps."""
        return False

    @property
    def exact(self) -> bool:
        """False: first order in the step."""
        return False

    def transition(
        self,
        flow_map: FlowMap,
        x_t: Float[Tensor, "b *shape"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        cond: Conditioning,
    ) -> Gaussian:
        """The density of `x_s` given `x_t`, for `0 < s < t <= 1`; one velocity call.

        Raises:
            ValueError: times of another shape or order.
            CompositionError: another path than the linear one, or a single-time map.
        """
        require_linear(flow_map, "dance-sde")
        t, s = step_times(t, s)
        v = flow_map.velocity(x_t, t, cond)
        dt, eta = s - t, self.config.noise_level
        denoised = x_t - expand(t, x_t) * v
        score = -(x_t - expand(1 - t, x_t) * denoised) / expand(t.square(), x_t)
        mean = x_t + expand(dt, x_t) * (v - 0.5 * eta**2 * score)
        return Gaussian(mean, eta * (-dt).sqrt())


@stochasticizers.register("cps", CpsConfig)
@dataclass(frozen=True)
class Cps:
    """Flow-CPS (arXiv 2509.05952), coefficients-preserving sampling (eq. 17).

    `mean = (1 - s) x0 + s cos(k pi/2) x1`, `std = s sin(k pi/2)`, with the endpoint estimates `x0 = x - t v` and
    `x1 = x + (1 - t) v`. The published code drops the variance from its log-probability; here it is the Gaussian one
    unless `published_log_prob` is set.
    """

    config: CpsConfig

    @property
    def path_preserving(self) -> bool:
        """False: the endpoint estimates are conditional means, whose spread is too small."""
        return False

    @property
    def exact(self) -> bool:
        """False: first order in the step."""
        return False

    def transition(
        self,
        flow_map: FlowMap,
        x_t: Float[Tensor, "b *shape"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        cond: Conditioning,
    ) -> Gaussian:
        """The density of `x_s` given `x_t`, for `0 < s < t <= 1`; one velocity call.

        Raises:
            ValueError: times of another shape or order.
            CompositionError: another path than the linear one, or a single-time map.
        """
        require_linear(flow_map, "cps")
        t, s = step_times(t, s)
        v = flow_map.velocity(x_t, t, cond)
        angle = self.config.noise_level * math.pi / 2
        data = x_t - expand(t, x_t) * v
        noise = x_t + expand(1 - t, x_t) * v
        # sqrt(s^2 - std^2) of the paper, without its cancellation at k = 1
        mean = expand(1 - s, x_t) * data + expand(s * math.cos(angle), x_t) * noise
        density = UnscaledGaussian if self.config.published_log_prob else Gaussian
        return density(mean, s * math.sin(angle))
