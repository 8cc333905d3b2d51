"""Baselines on the linear path, which leave the probability path at 4 or 5 steps (docs/math.md, eq. 15-18).

Three sample with the diagonal velocity `v(x, t) = u(x, t, t)`, as discretisations of a stochastic differential equation
or close to one. The last adds noise to the map itself: a test of path preservation must fail on it.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fmg.core.protocols import FlowMap
from fmg.core.types import Conditioning
from fmg.flow.gaussian import Gaussian, UnscaledGaussian
from fmg.flow.path import expand
from fmg.stochasticizers.base import BaseStochasticizer, C
from fmg.stochasticizers.configs import CpsConfig, DanceSdeConfig, FlowSdeConfig, NaiveNoiseConfig


class _Baseline(BaseStochasticizer[C]):
    path_preserving = False
    linear_only: ClassVar[bool] = True


class FlowSde(_Baseline[FlowSdeConfig]):
    """Flow-GRPO (arXiv 2505.05470): Euler-Maruyama with `eta_t = k sqrt(t / (1 - t))` (eq. 15).

    At `t = 1` the denominator takes the next grid time, as its code does.
    """

    name = "flow-sde"

    def _density(self, flow_map: FlowMap, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Gaussian:
        v = flow_map.velocity(x_t, t, cond)
        dt = s - t
        eta = self.config.noise_level * (t / (1 - torch.where(t == 1, s, t))).sqrt()
        drift = eta.square() / (2 * t)
        mean = x_t * expand(1 + drift * dt, x_t) + v * expand((1 + drift * (1 - t)) * dt, x_t)
        return Gaussian(mean, eta * (-dt).sqrt())


class DanceSde(_Baseline[DanceSdeConfig]):
    """DanceGRPO (arXiv 2505.07818): constant diffusion `eta`, with the score of the denoised estimate (eq. 16)."""

    name = "dance-sde"

    def _density(self, flow_map: FlowMap, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Gaussian:
        v = flow_map.velocity(x_t, t, cond)
        dt, eta = s - t, self.config.noise_level
        denoised = x_t - expand(t, x_t) * v
        score = -(x_t - expand(1 - t, x_t) * denoised) / expand(t.square(), x_t)
        mean = x_t + expand(dt, x_t) * (v - 0.5 * eta**2 * score)
        return Gaussian(mean, eta * (-dt).sqrt())


class Cps(_Baseline[CpsConfig]):
    """Flow-CPS (arXiv 2509.05952), coefficients-preserving sampling (eq. 17).

    `mean = (1 - s) x0 + s cos(k pi/2) x1`, `std = s sin(k pi/2)`, with the endpoint estimates `x0 = x - t v` and
    `x1 = x + (1 - t) v`: conditional means, whose spread is too small. The published code drops the variance from its
    log-probability; here it is the Gaussian one unless `published_log_prob` is set.
    """

    name = "cps"

    def _density(self, flow_map: FlowMap, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Gaussian:
        v = flow_map.velocity(x_t, t, cond)
        angle = self.config.noise_level * math.pi / 2
        data = x_t - expand(t, x_t) * v
        noise = x_t + expand(1 - t, x_t) * v
        # sqrt(s^2 - std^2) of the paper, without its cancellation at k = 1
        mean = expand(1 - s, x_t) * data + expand(s * math.cos(angle), x_t) * noise
        density = UnscaledGaussian if self.config.published_log_prob else Gaussian
        return density(mean, s * math.sin(angle))


class NaiveNoise(_Baseline[NaiveNoiseConfig]):
    """The control (eq. 18): `x_s ~ N(X_{t->s}(x_t), k^2 s^2 I)`.

    The map already carries all the noise of `p_s`, so this has too much.
    """

    name = "naive-noise"

    def _density(self, flow_map: FlowMap, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Gaussian:
        return Gaussian(flow_map.jump(x_t, t, s, cond), self.config.noise_level * s)
