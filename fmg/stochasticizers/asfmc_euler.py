"""The local anchor of Flow-Map GRPO (arXiv 2607.00535) in first-order form (docs/math.md, eq. 14)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CompositionError
from fmg.core.protocols import FlowMap
from fmg.core.types import Conditioning
from fmg.flow.gaussian import Gaussian
from fmg.flow.path import expand
from fmg.registry import stochasticizers
from fmg.stochasticizers.configs import AsfmcEulerConfig
from fmg.stochasticizers.guards import require_linear, step_times


@stochasticizers.register("asfmc-euler", AsfmcEulerConfig)
@dataclass(frozen=True)
class AsfmcEuler:
    """`y = X_{t->s}(x_t)`, `mean = y - h (y / (1 - s) + v(y, s))`, `var = 2 h s / (1 - s)`, `h = epsilon strength^2`.

    The expansion of the exact kernel at `a = s - h` to first order in `h`; both means and both variances differ by
    `O(h^2)`. It leans on the diagonal velocity where the exact form leans on the off-diagonal map. The gradient flows
    through `v` as well, so that the ratio is that of the density it is named after; `detach_velocity` stops it there.
    With `floor`, `1 - s` is never less than that; with `truncate`, `epsilon` is never more than `s`. Both are in the
    published code and change nothing on the `paper` grid.
    """

    config: AsfmcEulerConfig

    @property
    def path_preserving(self) -> bool:
        """True up to `O(h^2)` a step; see `exact`."""
        return True

    @property
    def exact(self) -> bool:
        """False: first order in `h`."""
        return False

    def transition(
        self,
        flow_map: FlowMap,
        x_t: Float[Tensor, "b *shape"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        cond: Conditioning,
    ) -> Gaussian:
        """The density of `x_s` given `x_t`, for `epsilon < s < t <= 1`; two calls of a two-time map.

        Raises:
            ValueError: times of another shape or order.
            CompositionError: another path than the linear one, a target time not above `epsilon`, or a single-time map.
        """
        require_linear(flow_map, "asfmc-euler")
        t, s = step_times(t, s)
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
