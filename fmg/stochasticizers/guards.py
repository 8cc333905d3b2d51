"""Checks that every transition shares."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CompositionError
from fmg.core.protocols import FlowMap
from fmg.flow.path import LinearPath, check_times


def step_times(t: Float[Tensor, " b"], s: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Both times in fp32 or better, after checking `0 < s < t <= 1` in every row.

    Raises:
        ValueError: for times of another shape, type or order. The last step, to 0, is the deterministic map.
    """
    t, s = check_times(t, "t"), check_times(s, "s")
    if t.shape != s.shape:
        raise ValueError(f"t and s need one shape, got {tuple(t.shape)} and {tuple(s.shape)}")
    if not torch.compiler.is_compiling() and not bool(((s > 0) & (s < t)).all()):
        raise ValueError("a stochastic transition needs 0 < s < t in every row; the step to 0 is the map itself")
    return t, s


def require_linear(flow_map: FlowMap, name: str) -> None:
    """Refuses a map on another path than the linear one.

    Raises:
        CompositionError: naming the stochasticizer and the path.
    """
    if flow_map.path.name != LinearPath.name:
        raise CompositionError(
            f"'{name}' is defined on the linear path, but the model uses the path '{flow_map.path.name}'",
            "Use 'asfmc' or 'asfmc-endpoint', which fit every path.",
        )
