"""Anchored stochastic flow map composition: jump to an anchor, then resample forward (docs/math.md, eq. 11-14).

Flow-Map GRPO, arXiv 2607.00535 (which runs time the other way).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CompositionError
from fmg.core.protocols import FlowMap
from fmg.core.types import Conditioning
from fmg.flow.gaussian import Gaussian
from fmg.flow.path import expand
from fmg.stochasticizers.base import BaseStochasticizer
from fmg.stochasticizers.configs import LARGEST_SHARE, AsfmcConfig, AsfmcEndpointConfig, AsfmcEulerConfig


class Asfmc(BaseStochasticizer[AsfmcConfig]):
    """`x_s ~ N((alpha_s / alpha_a) X_{t->a}(x_t), sigma_s^2 (1 - m^2) I)` with an anchor `a` in [0, s] (eq. 11).

    For an exact map `X_{t->a}(x_t) ~ p_a`, so `x_s ~ p_s`: the path is preserved for every anchor, with one network
    call and no small-step limit. Needs a two-time map.
    """

    name = "asfmc"
    path_preserving = True

    def _density(self, flow_map: FlowMap, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Gaussian:
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


class AsfmcEndpoint(BaseStochasticizer[AsfmcEndpointConfig]):
    """`x_s ~ N(alpha_s X_{t->0}(x_t), lambda^2 sigma_s^2 I)`: the anchor at the clean endpoint (eq. 13).

    At `lambda = 1` this is multistep consistency sampling (Song et al. 2023, arXiv 2303.01469) as a policy. A smaller
    `lambda`, the only noise dial of a single-time map, leaves the path (FlowMap-OPD sweeps it).
    """

    name = "asfmc-endpoint"

    def __init__(self, config: AsfmcEndpointConfig) -> None:
        super().__init__(config)
        self.path_preserving = config.noise_level == 1

    def _density(self, flow_map: FlowMap, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Gaussian:
        endpoint = torch.zeros_like(s)
        scale, std = flow_map.path.kernel(endpoint, s)
        return Gaussian(expand(scale, x_t) * flow_map.jump(x_t, t, endpoint, cond), self.config.noise_level * std)


class AsfmcEuler(BaseStochasticizer[AsfmcEulerConfig]):
    """The paper's local anchor in first-order form (eq. 14): two network evaluations, for `epsilon < s`.

    `y = X_{t->s}(x_t)`, `mean = y - h (y / (1 - s) + v(y, s))`, `var = 2 h s / (1 - s)`, `h = epsilon strength^2`.

    The expansion of the exact kernel at `a = s - h` to first order in `h`; both means and both variances differ by
    `O(h^2)`, and so does the path that it preserves. It relies on the diagonal velocity where the exact form relies on
    the off-diagonal map. The gradient flows through `v` as well, so that the ratio is that of this density;
    `detach_velocity` stops it there. With `floor`, `1 - s` is never less than that; with `truncate`, `epsilon` is never
    more than `s`. Both are in the published code and change nothing on the `paper` grid.
    """

    name = "asfmc-euler"
    path_preserving = True
    linear_only: ClassVar[bool] = True

    def _density(self, flow_map: FlowMap, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Gaussian:
        epsilon, floor = self.config.epsilon, self.config.floor
        if not self.config.truncate and not torch.compiler.is_compiling() and bool((s <= epsilon).any()):
            raise CompositionError(
                f"'asfmc-euler' with epsilon {epsilon:g} cannot step to the time {s.min().item():g}",
                "Lower epsilon below every interior time of the grid, or change the grid.",
            )
        y = flow_map.jump(x_t, t, s, cond)
        v = flow_map.velocity(y, s, cond)
        if self.config.detach_velocity:
            v = v.detach()
        strength = self.config.strength**2
        h = torch.full_like(s, epsilon * strength)
        if self.config.truncate:
            h = torch.minimum(h, s * strength)
        rest = 1 - s if floor is None else (1 - s).clamp_min(floor)
        mean = y - expand(h, y) * (y / expand(rest, y) + v)
        return Gaussian(mean, (2 * h * s / rest).sqrt())
