"""Stored tensors one at a time, in any order, without keeping their files in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fmg.models.common.weights import FLOATS, WINDOW_BYTES, check_dtype, tensor_names, unreadable

STORED_DTYPES: Mapping[str, torch.dtype] = {
    **FLOATS,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by the names that safetensors files give them."""


class TensorReader:
    """Reads stored tensors one at a time, in any order.

    A file is opened again once a window of it has been read: mapped pages count as the process's memory until then.

    Args:
        files: file of each tensor by its name.
        aliases: names that tensors have in their files, where those differ.
    """

    def __init__(self, files: Mapping[str, Path], aliases: Mapping[str, str] | None = None) -> None:
        self._files = files
        self._aliases = aliases or {}
        self._file: Path | None = None
        self._opened: Any = None
        self._size = 0

    @classmethod
    def of(cls, file: Path) -> TensorReader:
        """All tensors of one file.

        Raises:
            CheckpointError: it is missing or no safetensors file.
        """
        try:
            return cls(dict.fromkeys(tensor_names(file), file))
        except (OSError, SafetensorError) as error:
            raise unreadable(file, error) from error

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._files))

    def under(self, other: TensorReader) -> TensorReader:
        """These tensors, but those of `other` where it has one of that name; for readers without aliases."""
        return TensorReader({**self._files, **other._files})

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, in its stored dtype, memory-mapped.

        Raises:
            CheckpointError: there is no such tensor, or its file is missing or damaged.
        """
        tensor: Tensor = self._at(name).get_tensor(self._aliases.get(name, name))
        self._size += tensor.nbytes
        return tensor

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of the tensor called `name`, from the header of its file. Errors as `read`."""
        stored = self._at(name).get_slice(self._aliases.get(name, name))
        check_dtype(name, stored.get_dtype(), self._files[name], STORED_DTYPES)
        return STORED_DTYPES[stored.get_dtype()], tuple(stored.get_shape())

    def _at(self, name: str) -> Any:
        file = self._files[name]
        try:
            if file != self._file or self._size > WINDOW_BYTES:
                self._opened, self._file, self._size = safe_open(str(file), framework="pt"), file, 0
        except (OSError, SafetensorError) as error:
            raise unreadable(file, error) from error
        return self._opened
