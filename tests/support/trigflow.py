"""The TrigFlow wrapper of published students, which `SingleTimeMap` and `TrigFlowMap` do not need."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from fmg.flow import expand


def trigflow_prediction(
    network: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "b *shape"],
    angle: Float[Tensor, " b"],
    sigma_data: float = 0.5,
) -> Float[Tensor, "b *shape"]:
    """The TrigFlow output `F` of a rectified-flow network `net(z, s)`, as T2I-Distill and SANA-Sprint wrap it (eq. 8).

    With `s = sin/(sin + cos)`, `r = sqrt(s^2 + (1-s)^2)`, `z = x r / sigma_data`:
    `F = ((1 - 2s) z + r^2 net(z, s)) / r`. Then `cos x - sin sigma_data F = sigma_data (z - s net(z, s))`: wrapper and
    `sigma_data` cancel, which is why `SingleTimeMap` needs neither.

    Args:
        network: the rectified-flow velocity network.
        x: TrigFlow state `cos x_0 + sin sigma_data eps`, where `x_0` has standard deviation `sigma_data`.
        angle: `(b,)` in [0, pi/2].
        sigma_data: standard deviation of the data.
    """
    s = angle.sin() / (angle.sin() + angle.cos())
    norm = (s.square() + (1 - s).square()).sqrt()
    z = x * expand(norm / sigma_data, x)
    return (expand(1 - 2 * s, x) * z + expand(norm.square(), x) * network(z, s)) / expand(norm, x)
