"""The sampler of `fmg.flow.sampling` on any arrays that can be multiplied and added (docs/math.md, eq. 2, 6, 7).

Times are rounded to fp32 before they are subtracted, as the torch sampler does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np

from fmg.core.errors import UsageError, suggestion

Array = TypeVar("Array", bound=Any)


def few_step(
    velocity: Callable[[Array, float, float], Array],
    x_1: Array,
    times: Sequence[float],
    renoise: Callable[[int], Array],
    *,
    kind: Literal["two-time", "single-time"],
    path: str,
) -> Array:
    """Draws `x_0` from the noise `x_1` along `times` (from 1 down to 0), one network call an interval.

    A two-time map jumps from one grid time to the next. A single-time map goes on by multistep consistency sampling
    (Song et al., arXiv 2303.01469, algorithm 1): jump to 0, then forward noise to the next grid time.

    Args:
        velocity: `(x_t, t, s) -> u`, the network; for a single-time map `s` is 0.
        x_1: standard normal noise.
        times: strictly falling times, first 1, last 0.
        renoise: standard normal noise of interval `k`; not called for two-time maps.
        kind: kind of map.
        path: `linear` or `trig`.
    """
    x: Any = x_1
    for k, (t, s) in enumerate(pairwise([float(np.float32(time)) for time in times])):
        if kind == "two-time":
            x = x - _rounded(t - s) * velocity(x, t, s)
            continue
        x = x - t * velocity(x, t, 0.0)
        if s > 0:
            scale, std = kernel_from_data(path, s)
            x = scale * x + std * renoise(k)
    drawn: Array = x
    return drawn


def kernel_from_data(path: str, s: float) -> tuple[float, float]:
    """Scale and std of `q(x_s | x_0)`: `1 - s` and `s`, or for TrigFlow cosine and sine of `s pi/2` (eq. 2).

    Raises:
        UsageError: for another path.
    """
    if path == "linear":
        return _rounded(1 - s), s
    if path == "trig":
        return _rounded(math.sin((1 - s) * math.pi / 2)), _rounded(math.sin(s * math.pi / 2))
    raise UsageError(f"There is no probability path named '{path}'", suggestion(path, ("linear", "trig")))


def _rounded(value: float) -> float:
    return float(np.float32(value))
