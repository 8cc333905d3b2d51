"""The weights of each policy of one network: the trained ones, the last snapshot, and the base."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fmg.core.errors import CompositionError
from fmg.models.common import adapter


class WeightSnapshot:
    """A frozen copy of parameters that can replace them for the length of a call.

    The values are exchanged in place rather than through `torch.func.functional_call`: the wrapped module is called
    as it is, so hooks of DDP, FSDP2 (which would gather the current weights again under substituted ones) and PEFT
    see nothing unusual. It costs two copies of the weights per call and the memory of one tensor, and leaves a pending
    backward of the current policy valid, because the values are back, bit for bit, when it runs.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._values = [parameter.detach().clone() for parameter in parameters]

    def take(self) -> None:
        """Freezes the current values, in the memory of the previous ones."""
        for parameter, value in zip(self._parameters, self._values, strict=True):
            value.copy_(parameter.detach())

    @property
    def values(self) -> Sequence[Tensor]:
        """The frozen values, in the order of the parameters; while they are in place, the current ones."""
        return self._values

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Runs the body with the frozen values."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for parameter, value in zip(self._parameters, self._values, strict=True):
            current = parameter.detach().clone()
            # through .data, so that autograd's version counter does not call the exchange a modification
            parameter.data.copy_(value)
            value.copy_(current)


class TrainableBase:
    """Base parameters made trainable in fp32, because bf16 would round away updates as small as those of RL.

    Args:
        parameters: parameters by their names in the state dict without an adapter; their values become fp32.
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

    def _kept(self) -> WeightSnapshot:
        if self._base is None:
            raise CompositionError(
                "The base is no longer in memory, because every weight is trained and no copy was kept",
                "Use an objective that declares that it needs the reference.",
            )
        return self._base


Scope = Callable[[], AbstractContextManager[None]]
"""Creates the context that a call of the network runs in."""


class PolicyScopes:
    """Contexts for the calls of a transformer whose LoRA, base weights, or both are trained.

    Args:
        transformer: the network.
        trained: its trained parameters.
        base: those among them that belong to the base.
        dtype: the dtype the network computes in; if it is not fp32, fp32 weights run under autocast.
        keep_old: whether a copy of the trained parameters is kept for `old`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        trained: Sequence[nn.Parameter],
        base: TrainableBase | None,
        dtype: torch.dtype,
        *,
        keep_old: bool,
    ) -> None:
        self.layers = adapter.tuner_layers(transformer)
        self.base_lost = False
        self._dropouts = adapter.dropout_modules(transformer)
        self._trainable_base = base
        self._autocast = dtype if base is not None and base.whole and dtype != torch.float32 else None
        self._device_type = next(transformer.parameters()).device.type
        self._old = WeightSnapshot(trained) if keep_old else None

    def snapshot(self) -> None:
        """Freezes the trained weights for `old`, where a copy is kept."""
        if self._old is not None:
            self._old.take()

    @contextmanager
    def adapter(self, *, enabled: bool) -> Iterator[None]:
        """Runs the body with the trained weights, or with those of the base.

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
                "Use an objective that declares that it needs the old policy.",
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
        return nullcontext() if self._trainable_base is None else self._trainable_base.base_in_place()

    @contextmanager
    def _precision(self) -> Iterator[None]:
        if self._autocast is None:
            yield
            return
        with warnings.catch_warnings(), torch.autocast(self._device_type, dtype=self._autocast):
            # fp32 weights of norms over bf16 inputs are what autocast is for, not a mistake
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            yield
