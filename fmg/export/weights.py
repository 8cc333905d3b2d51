"""One safetensors file per graph, written tensor by tensor.

The layout depends only on names, dtypes and shapes, so another adapter gives a file with identical header and offsets,
and the graph that points into it need not change. Data begin on a page.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmg.core.errors import CheckpointError
from fmg.core.json_io import read_safetensors_header
from fmg.inference.artifact.manifest import FileEntry
from fmg.models.common.weights import STORED_DTYPES

PAGE = 4096
_LENGTH = 8  # bytes of a safetensors file before its header
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}

TensorType = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape."""


@dataclass(frozen=True)
class Placement:
    """The place of a tensor: `length` bytes from `offset` in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class WeightLayout:
    """A safetensors file without its data: header bytes, the place of each tensor in order, and the total size."""

    header: bytes
    places: Mapping[str, Placement]
    size: int


def lay_out(tensors: Mapping[str, TensorType]) -> WeightLayout:
    """The layout of a file with these tensors: widest dtype first, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    relative: dict[str, tuple[int, int]] = {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        relative[name] = (start, end)
    entries = {
        name: {"dtype": _NAMES[tensors[name][0]], "shape": list(tensors[name][1]), "data_offsets": list(relative[name])}
        for name in order
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH + len(text)) % PAGE)
    header = len(text).to_bytes(_LENGTH, "little") + text
    places = {
        name: Placement(*tensors[name], len(header) + start, stop - start) for name, (start, stop) in relative.items()
    }
    return WeightLayout(header, places, len(header) + end)


def stored_places(file: Path) -> Mapping[str, tuple[int, int]]:
    """Offset in the file and length in bytes of each tensor of a safetensors file.

    Raises:
        CheckpointError: it is not a safetensors file.
    """
    try:
        header, data = read_safetensors_header(file)
        entries: dict[str, Any] = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = {name: entry["data_offsets"] for name, entry in entries.items()}
        return {name: (data + start, stop - start) for name, (start, stop) in spans.items()}
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(
            f"{file} is not a safetensors file", "Restore the artifact, or export it again."
        ) from None


def write_weights(
    file: Path,
    layout: WeightLayout,
    read: Callable[[str], Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FileEntry:
    """Writes a file tensor by tensor, and hashes it as it goes.

    Args:
        file: the file to write; it must not exist.
        layout: from `lay_out`.
        read: returns the tensor of a name in the dtype and shape of the layout; called once for each, in order.
        progress: called with (bytes done, total bytes) after each tensor.

    Raises:
        CheckpointError: a tensor does not match the layout, or is not finite.
    """
    digest = hashlib.sha256(layout.header)
    with file.open("xb") as out:
        out.write(layout.header)
        for name, place in layout.places.items():
            tensor = read(name)
            if (tensor.dtype, tuple(tensor.shape)) != (place.dtype, place.shape):
                raise CheckpointError(
                    f"'{name}' is {tensor.dtype} {tuple(tensor.shape)} instead of {place.dtype} {place.shape}",
                    "Give weights and a config of the same model.",
                )
            if tensor.is_floating_point() and not _finite(tensor):
                raise CheckpointError(
                    f"'{name}' is not finite in {str(place.dtype).removeprefix('torch.')}",
                    "Export with another --precision (bf16 has the range of fp32), or restore the weights.",
                )
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            out.write(data)
            digest.update(data)
            progress(place.offset + place.length, layout.size)
    return FileEntry(digest.hexdigest(), layout.size)


def _finite(tensor: Tensor) -> bool:
    # torch cannot compare 8-bit floats
    return bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all())
