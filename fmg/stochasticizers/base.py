"""The base of all stochasticizers: declared properties, checks of a transition, and the signature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CompositionError
from fmg.core.protocols import FlowMap
from fmg.core.types import Conditioning
from fmg.flow.gaussian import Gaussian
from fmg.flow.path import LinearPath, check_times
from fmg.registry.config import StochasticizerConfig

C = TypeVar("C", bound=StochasticizerConfig)


class BaseStochasticizer(ABC, Generic[C]):
    """A built-in stochasticizer: subclasses implement the density, whose times have been checked.

    Attributes:
        name: its registered name.
        path_preserving: whether `x_t ~ p_t` implies `x_s ~ p_s` for an exact map.
        linear_only: whether it is defined only on the linear path.
    """

    name: ClassVar[str]
    path_preserving: bool
    linear_only: ClassVar[bool] = False

    def __init__(self, config: C) -> None:
        self.config = config

    def transition(
        self,
        flow_map: FlowMap,
        x_t: Float[Tensor, "b *shape"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        cond: Conditioning,
    ) -> Gaussian:
        """The density of `x_s` given `x_t`, for `0 < s < t <= 1`.

        Raises:
            ValueError: times with the wrong shape, type or order. The last step, to 0, is the deterministic map.
            CompositionError: the map does not fit the stochasticizer, for example because it is on another path.
        """
        if self.linear_only and flow_map.path.name != LinearPath.name:
            raise CompositionError(
                f"'{self.name}' is defined on the linear path, but the model uses the path '{flow_map.path.name}'",
                "Use 'asfmc' or 'asfmc-endpoint', which fit every path.",
            )
        # in fp32 or better
        t, s = check_times(t, "t"), check_times(s, "s")
        if t.shape != s.shape:
            raise ValueError(f"t and s must have the same shape, got {tuple(t.shape)} and {tuple(s.shape)}")
        if not torch.compiler.is_compiling() and not bool(((s > 0) & (s < t)).all()):
            raise ValueError("a stochastic transition needs 0 < s < t in every row; the step to 0 is the map itself")
        return self._density(flow_map, x_t, t, s, cond)

    @abstractmethod
    def _density(self, flow_map: FlowMap, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Gaussian:
        """`transition` for times that have been checked."""
