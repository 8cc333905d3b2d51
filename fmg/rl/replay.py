"""Evaluating the transitions of a batch again under a policy: what ratios and KLs rest on."""

from __future__ import annotations

from typing import NoReturn

from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CompositionError
from fmg.core.protocols import Density, FlowMap, Stochasticizer
from fmg.core.types import Batch, Conditioning


def replay(stochasticizer: Stochasticizer, flow_map: FlowMap, batch: Batch) -> Density:
    """The transition densities of the rows' `x_t`, `t`, `s` under `flow_map`."""
    rows = batch.rows
    return stochasticizer.transition(flow_map, rows["x_t"], rows["t"], rows["s"], batch.cond)


def mean_distance(
    mean: Float[Tensor, "b *shape"], other: Float[Tensor, "b *shape"], std: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """KL of two Gaussians with one std, averaged over coordinates: `mean_d (mu - mu')^2 / (2 std^2)`, fp32."""
    return (mean.float() - other.float()).square().flatten(1).mean(1) / (2 * std.square())


class Unbound:
    """Stands for the stochasticizer of an objective that has not been given one yet."""

    path_preserving = False

    def __init__(self, objective: str) -> None:
        self._objective = objective

    def transition(
        self,
        flow_map: FlowMap,
        x_t: Float[Tensor, "b *shape"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        cond: Conditioning,
    ) -> NoReturn:
        """Refuses.

        Raises:
            CompositionError: always.
        """
        raise CompositionError(
            f"The objective '{self._objective}' has no stochasticizer",
            "Call objective.bind(stochasticizer) with the one that draws the rollout.",
        )
