"""The transformer's weights of an artifact: base plus what a run changed, and what the base had in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fmg.export.delta import Delta
from fmg.export.weights import TensorType, lay_out, write_weights
from fmg.inference.artifact.manifest import FileEntry
from fmg.models.common.weights import TensorReader


def merged(base: TensorReader, delta: Delta | None, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Reads weights with the changes of a run, in `dtype`; the sums are made in fp32."""
    if delta is None:
        return lambda name: base.read(name).to(dtype)
    return lambda name: delta.apply(name, base.read(name), dtype)


def write_base(file: Path, base: TensorReader, names: Iterable[str], dtype: torch.dtype | None = None) -> FileEntry:
    """Writes some weights of the base, in `dtype` or (None) as `base` stores them."""
    layout = lay_out({name: (dtype or stored, shape) for name in names for stored, shape in [base.describe(name)]})
    return write_weights(file, layout, lambda name: base.read(name).to(dtype) if dtype else base.read(name))


def base_dtypes(stored: Mapping[str, TensorType]) -> tuple[str, ...]:
    """Names of the dtypes that weights are stored in, sorted."""
    return tuple(sorted({str(dtype).removeprefix("torch.") for dtype, _ in stored.values()}))
