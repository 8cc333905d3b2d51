"""The contexts in which one network stands for several policies: the trained one, the one before, and the base."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from fmg.core.errors import CompositionError
from fmg.models.common import adapter
from fmg.models.common.adapter import WeightSnapshot
from fmg.models.common.unfrozen import Unfrozen

Scope = Callable[[], AbstractContextManager[None]]
"""What makes the context that a call of the network runs in."""


class PolicyScopes:
    """Contexts for the calls of a transformer whose LoRA, unfrozen weights, or both are trained.

    Args:
        transformer: the network.
        trained: its trained parameters.
        unfrozen: those among them that belong to the base.
        dtype: in which the network computes; fp32 weights of another dtype's network run under autocast.
        keep_old: whether a copy of the trained parameters is kept for `old`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        trained: Sequence[nn.Parameter],
        unfrozen: Unfrozen | None,
        dtype: torch.dtype,
        *,
        keep_old: bool,
    ) -> None:
        self.layers = adapter.tuner_layers(transformer)
        self.base_lost = False
        self._dropouts = adapter.dropout_modules(transformer)
        self._unfrozen = unfrozen
        self._autocast = dtype if unfrozen is not None and unfrozen.whole and dtype != torch.float32 else None
        self._device_type = next(transformer.parameters()).device.type
        self._old = WeightSnapshot(trained) if keep_old else None

    def snapshot(self) -> None:
        """Freezes the trained weights for `old`, where a copy is kept."""
        if self._old is not None:
            self._old.take()

    @contextmanager
    def adapter(self, *, enabled: bool) -> Iterator[None]:
        """What is trained on, or off: then the weights are those of the base.

        Raises:
            CompositionError: the weights of the base are not in memory.
        """
        base = nullcontext() if enabled else self._base()
        with adapter.adapter_switched(self.layers, enabled), base:
            yield

    @contextmanager
    def current(self) -> Iterator[None]:
        """The trained weights; without LoRA dropout where no gradient is recorded."""
        dropout = nullcontext() if torch.is_grad_enabled() else adapter.dropout_off(self._dropouts)
        with dropout, self._precision():
            yield

    @contextmanager
    def old(self) -> Iterator[None]:
        """The weights of the last snapshot, without gradients.

        Raises:
            CompositionError: none is kept.
        """
        if self._old is None:
            raise CompositionError(
                "No copy of the old policy is kept",
                "Use an objective that declares that it compares with the old policy.",
            )
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(adapter.dropout_off(self._dropouts))
            stack.enter_context(adapter.adapter_switched(self.layers, enabled=True))
            stack.enter_context(self._old.in_place())
            stack.enter_context(self._precision())
            yield

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The weights of the base, without gradients.

        Raises:
            CompositionError: they are not in memory.
        """
        with torch.no_grad(), self.adapter(enabled=False), self._precision():
            yield

    def _base(self) -> AbstractContextManager[None]:
        if self.base_lost:
            raise CompositionError(
                "The base is not in memory, because every weight was loaded from a tuned checkpoint",
                "Load the model without the checkpoint beside it.",
            )
        return nullcontext() if self._unfrozen is None else self._unfrozen.base_in_place()

    @contextmanager
    def _precision(self) -> Iterator[None]:
        if self._autocast is None:
            yield
            return
        with warnings.catch_warnings(), torch.autocast(self._device_type, dtype=self._autocast):
            # fp32 weights of norms over bf16 inputs are what autocast is for, not a mistake
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            yield
