"""The control: noise on top of the map (docs/math.md, eq. 18). A test of path preservation has to fail on it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fmg.core.protocols import FlowMap
from fmg.core.types import Conditioning
from fmg.flow.gaussian import Gaussian
from fmg.registry import stochasticizers
from fmg.stochasticizers.configs import NaiveNoiseConfig
from fmg.stochasticizers.guards import require_linear, step_times


@stochasticizers.register("naive-noise", NaiveNoiseConfig)
@dataclass(frozen=True)
class NaiveNoise:
    """`x_s ~ N(X_{t->s}(x_t), k^2 s^2 I)`: the map already carries all the noise of `p_s`, so this has too much."""

    config: NaiveNoiseConfig

    @property
    def path_preserving(self) -> bool:
        """False."""
        return False

    @property
    def exact(self) -> bool:
        """True: nothing is expanded, it is merely not on the path."""
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
            CompositionError: another path than the linear one, or a single-time map.
        """
        require_linear(flow_map, "naive-noise")
        t, s = step_times(t, s)
        return Gaussian(flow_map.jump(x_t, t, s, cond), self.config.noise_level * s)
