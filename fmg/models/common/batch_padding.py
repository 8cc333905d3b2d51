"""Network calls of one shape: what is too short is filled up and cut off again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.protocols import Anchors, FlowMap, ProbabilityPath
from fmg.core.types import Conditioning


class PaddedBatches:
    """A flow map that repeats the last row of a short batch, so that kernels see one shape.

    Matrix products of another size sum in another order. In bf16 that moves a log-prob by more than a tenth of a clip
    range, so the last, shorter micro-batch of a rollout or an update would not replay to ratio 1.

    Args:
        inner: the map.
        rows: asks for the number of rows to fill up to; None or a smaller batch than that leaves a call as it is.
    """

    def __init__(self, inner: FlowMap, rows: Callable[[], int | None]) -> None:
        self._inner = inner
        self._rows = rows

    @property
    def anchors(self) -> Anchors:
        """Those of the map."""
        return self._inner.anchors

    @property
    def path(self) -> ProbabilityPath:
        """That of the map."""
        return self._inner.path

    def jump(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`X_{t->s}(x_t)`."""
        index = self._index(len(x_t), x_t.device)
        if index is None:
            return self._inner.jump(x_t, t, s, cond)
        return self._inner.jump(x_t[index], t[index], s[index], cond.select(index))[: len(x_t)]

    def velocity(
        self, x_t: Float[Tensor, "b *shape"], t: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b *shape"]:
        """`v(x_t, t)`."""
        index = self._index(len(x_t), x_t.device)
        if index is None:
            return self._inner.velocity(x_t, t, cond)
        return self._inner.velocity(x_t[index], t[index], cond.select(index))[: len(x_t)]

    def _index(self, given: int, device: torch.device) -> Tensor | None:
        rows = self._rows()
        if rows is None or not 0 < given < rows:
            return None
        return torch.arange(rows, device=device).clamp(max=given - 1)
