"""The stochasticizer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CompositionError
from fmg.core.protocols import FlowMap
from fmg.core.types import Conditioning
from fmg.flow import Gaussian, expand
from fmg_warmth.configs import HalfwayConfig


class Halfway:
    """Jumps to the anchor, then adds the noise of the path from there to the target time."""

    path_preserving = True

    def __init__(self, config: HalfwayConfig) -> None:
        self._fraction = config.fraction

    def transition(
        self,
        flow_map: FlowMap,
        x_t: Float[Tensor, "b *shape"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        cond: Conditioning,
    ) -> Gaussian:
        """`N(k X_{t->a}(x_t), std^2 I)` with the scale `k` and the std of `q(x_s | x_a)`."""
        if flow_map.anchors != "any":
            raise CompositionError("'asfmc-halfway' needs a two-time map", "Use 'asfmc-endpoint' with this model.")
        anchor = self._fraction * s
        scale, std = flow_map.path.kernel(anchor, s)
        x_a = flow_map.jump(x_t, t, anchor, cond)
        return Gaussian(expand(scale, x_a) * x_a, std)
