"""The few-step sampler of a flow map: from noise to data in N network evaluations (NFE).

`few_step` of `fmg.inference.artifact` is the same sampler for exported graphs, which run without torch; a test compares
the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.protocols import FlowMap
from fmg.core.types import Conditioning
from fmg.flow.path import renoised


def native_sample(
    flow_map: FlowMap,
    cond: Conditioning,
    x_1: Float[Tensor, "b *shape"],
    grid: Sequence[float],
    renoise: Callable[[int], Float[Tensor, "b *shape"]],
) -> Float[Tensor, "b *shape"]:
    """Samples `x_0` from the noise `x_1` along `grid` (from 1 down to 0), one network evaluation per interval.

    A two-time map jumps from one grid time to the next and is deterministic. A single-time map only reaches 0, so it
    is sampled by multistep consistency sampling (Song et al., arXiv 2303.01469, algorithm 1): jump to 0, then add noise
    up to the next grid time with `renoise(k)`, the standard normal noise of interval `k`. The same `renoise` gives the
    same image.

    Args:
        flow_map: the map.
        cond: conditioning of the `b` samples.
        x_1: standard normal noise.
        grid: strictly decreasing times, first 1, last 0.
        renoise: noise for interval `k`; not called for two-time maps.
    """
    *_, x_0 = native_states(flow_map, cond, x_1, grid, renoise)
    return x_0


def native_states(
    flow_map: FlowMap,
    cond: Conditioning,
    x_1: Float[Tensor, "b *shape"],
    grid: Sequence[float],
    renoise: Callable[[int], Float[Tensor, "b *shape"]],
) -> Iterator[Float[Tensor, "b *shape"]]:
    """The states of `native_sample` at every time of the grid, from `x_1` to `x_0`."""
    x = x_1
    yield x
    for k, (t, s) in enumerate(pairwise(grid)):
        x = native_step(flow_map, cond, x, t, s, lambda k=k: renoise(k))  # type: ignore[misc]
        yield x


def native_step(
    flow_map: FlowMap,
    cond: Conditioning,
    x: Float[Tensor, "b *shape"],
    t_value: float,
    s_value: float,
    renoise: Callable[[], Float[Tensor, "b *shape"]],
) -> Float[Tensor, "b *shape"]:
    """One interval of `native_sample`, from `t` to `s`; `renoise` is called for interior times of single-time maps."""
    t = torch.full((x.shape[0],), t_value, device=x.device)
    s = torch.full((x.shape[0],), s_value, device=x.device)
    if flow_map.anchors == "any" or s_value == 0.0:
        return flow_map.jump(x, t, s, cond)
    x_0 = flow_map.jump(x, t, torch.zeros_like(s), cond)
    return renoised(flow_map.path, x_0, s, renoise())
