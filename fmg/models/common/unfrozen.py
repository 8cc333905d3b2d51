"""Weights of a base that are trained themselves, beside or instead of a LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fmg.core.errors import CompositionError
from fmg.models.common.adapter import WeightSnapshot


class Unfrozen:
    """Parameters that got gradients and fp32, because bf16 would round away updates of the size that RL makes.

    Args:
        parameters: by their names in the state dict without an adapter; their values become fp32.
        keep_base: whether a frozen fp32 copy is kept, which `policies.reference` and the digest of the base need.
        whole: whether these are all weights of the network.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, keep_base: bool, whole: bool) -> None:
        self.parameters = dict(parameters)
        self.whole = whole
        self._dtypes = {name: p.dtype for name, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._base = WeightSnapshot(list(self.parameters.values())) if keep_base else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: tuple(p.shape) for name, p in self.parameters.items()}

    def base_tensors(self) -> dict[str, Tensor]:
        """The values of the base, in its dtype.

        Raises:
            CompositionError: no copy is kept.
        """
        values = self._kept().values
        return {name: x.to(self._dtypes[name]) for name, x in zip(self.parameters, values, strict=True)}

    @contextmanager
    def base_in_place(self) -> Iterator[None]:
        """Runs the body with the weights of the base.

        Raises:
            CompositionError: no copy is kept.
        """
        with self._kept().in_place():
            yield

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over values by name."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def _kept(self) -> WeightSnapshot:
        if self._base is None:
            raise CompositionError(
                "The base is no longer in memory, because every weight is trained and no copy was kept",
                "Use an objective that declares that it compares with the reference.",
            )
        return self._base
