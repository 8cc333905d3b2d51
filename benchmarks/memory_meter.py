"""Counts the memory of tensors as they are made and freed: a measured peak on any device, to compare plans with."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, follows the storage of every tensor that an operation makes, on the CPU also in backward passes.

    Workspace inside a kernel is not counted, nor are tensors made earlier.

    Example:
        >>> import torch
        >>> with MemoryMeter() as meter:
        ...     _ = torch.ones(1000).sum()
        >>> meter.peak
        4004
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts the storages of its results that are new."""
        out = func(*args, **(kwargs or {}))
        given = {_key(x) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._known | given:
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
