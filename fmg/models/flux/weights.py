"""Weights of a FLUX-class transformer: published files made safe, checked by name and shape, streamed into place.

A torch file is read once with `weights_only=True` and memory-mapped, and converted to safetensors shards in the cache
under the hash of its content. Safetensors files, single or sharded, are read where they are.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fmg.core.cache import cache_dir, content_hash, new_folder
from fmg.core.errors import CheckpointError
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel

INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"
PUBLISHED_KEY = "module"
DROPPED_PREFIX = "logvar_linear."
"""The one group of a published student that sampling does not need: the weighting head of sCM's training loss."""

_SECOND = "timestep_embedder2."
_RESTORE = "Restore the folder from where the model came from."
_SHARD_BYTES = 2 * 10**9
# What is read between two openings of a file: mapped pages count as the process's memory until it is closed.
_WINDOW_BYTES = 64 * 2**20

Shapes = Mapping[str, tuple[int, ...]]

STORED_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by the names that safetensors files give them."""


@dataclass(frozen=True)
class WeightFiles:
    """Tensors of safetensors files: where they came from, and the file of each by name."""

    origin: Path
    files: Mapping[str, Path]


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
        return STORED_DTYPES[stored.get_dtype()], tuple(stored.get_shape())

    def _at(self, name: str) -> Any:
        file = self._files[name]
        try:
            if file != self._file or self._size > _WINDOW_BYTES:
                self._opened, self._file, self._size = safe_open(str(file), framework="pt"), file, 0
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, error) from error
        return self._opened


def folder_weights(folder: Path) -> WeightFiles:
    """The tensors of a diffusers component folder, in one file or sharded.

    Raises:
        CheckpointError: there is no safetensors file, or it or its index cannot be read.
    """
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    single = next(iter(sorted(folder.glob("*.safetensors"))), None)
    if index is None and single is None:
        raise CheckpointError(
            f"{folder} has no .safetensors file",
            f"Other formats are not read, because a pickle can run code. {_RESTORE}",
        )
    try:
        if index is None:
            assert single is not None
            return WeightFiles(folder, dict.fromkeys(stored_names(single), single))
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return WeightFiles(folder, {str(name): folder / str(file) for name, file in shards.items()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise _unreadable(folder, error) from error


def student_weights(source: Path, shapes: Shapes) -> WeightFiles:
    """The tensors of a published student: a `.pt` file, a safetensors file or a component folder.

    Args:
        source: a torch file is converted to the cache first, unless that was done before.
        shapes: names and shapes that the transformer has; checked before anything is converted.

    Raises:
        CheckpointError: a file that cannot be read, holds anything but tensors, or does not fit the transformer.
    """
    if source.is_dir():
        return folder_weights(source)
    try:
        if source.suffix == ".safetensors":
            kept = [name for name in stored_names(source) if not name.startswith(DROPPED_PREFIX)]
            return WeightFiles(source, dict.fromkeys(kept, source))
        folder = cache_dir() / "models" / content_hash(source)
    except (OSError, SafetensorError) as error:
        raise _unreadable(source, error) from error
    if not folder.is_dir():
        tensors = {n: x for n, x in read_torch_file(source).items() if not n.startswith(DROPPED_PREFIX)}
        check_names(shapes, {name: tuple(x.shape) for name, x in tensors.items()}, source)
        with new_folder(folder) as partial:
            _write_shards(partial, tensors)
    return WeightFiles(source, folder_weights(folder).files)


def read_torch_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, under `module` (the published form) or at the top; memory-mapped, on the CPU.

    Raises:
        CheckpointError: a file that is missing, truncated, not a torch file, or holds anything but tensors.
    """
    try:
        if not zipfile.is_zipfile(file):
            with file.open("rb") as opened:
                damaged = opened.read(2) == b"PK" or file.stat().st_size == 0
            if damaged:
                raise CheckpointError(f"{file} is truncated", "Fetch or copy it again.")
        loaded = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is no checkpoint of tensors: what else a torch file holds is not loaded, because it can run code",
            "Give the published student, or plain tensors as .safetensors.",
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise _unreadable(file, error) from error
    inner = loaded.get(PUBLISHED_KEY, loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(inner, Mapping) or not inner or not all(isinstance(x, Tensor) for x in inner.values()):
        raise CheckpointError(
            f"{file} is not a published student: it has no mapping of names to tensors under '{PUBLISHED_KEY}'",
            "Give the student's checkpoint file.",
        )
    return {str(name): tensor for name, tensor in inner.items()}


def check_names(wanted: Shapes, given: Shapes, origin: Path) -> None:
    """Refuses weights with missing, left-over or wrongly shaped tensors.

    Raises:
        CheckpointError: naming them, and the likely mistake where the second time embedder is concerned.
    """
    absent, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if absent and all(name.startswith(_SECOND) for name in absent) and not extra:
        raise CheckpointError(
            f"The weights in {origin} have missing keys: {some(absent)}, the embedder of a two-time map's second time",
            "Give the MeanFlow student; for a single-time one use the model 'scm-flux'.",
        )
    if extra and all(name.startswith(_SECOND) for name in extra) and not absent:
        raise CheckpointError(
            f"The weights in {origin} have unexpected keys: {some(extra)}, which a single-time map does not have",
            "Give the sCM student; for a two-time one use the model 'meanflow-flux'.",
        )
    for problem, names in (("missing keys", absent), ("unexpected keys", extra)):
        if names:
            raise CheckpointError(
                f"The weights in {origin} have {problem}: {some(names)}",
                "Give the file that belongs to this model and teacher, or restore it from where it came from.",
            )
    for name in sorted(wanted):
        if wanted[name] != given[name]:
            raise CheckpointError(
                f"The weights in {origin} cannot be loaded: {name} has shape {given[name]} instead of {wanted[name]}",
                "Give the file and the config of one model.",
            )


def load_transformer(
    config: Mapping[str, Any],
    options: Mapping[str, object],
    weights: WeightFiles,
    device: torch.device,
    dtype: torch.dtype,
) -> FlowMapFluxTransformer2DModel:
    """A transformer with exactly these tensors, streamed straight to `device` in `dtype`.

    The modules are made without memory, and each tensor goes from its file to its place, so the host holds at most
    one window of a file besides a model on the CPU.

    Raises:
        CheckpointError: the config does not describe a transformer, or the tensors do not fit it.
    """
    transformer = empty_transformer(config, options, weights.origin)
    wanted = transformer_shapes(transformer)
    try:
        check_names(wanted, _stored_shapes(weights), weights.origin)
        for chunk in _windows(weights, wanted):
            placed = {name: x.to(device=device, dtype=dtype, copy=True) for name, x in chunk.items()}
            transformer.load_state_dict(placed, strict=False, assign=True)
    except (OSError, SafetensorError, KeyError) as error:
        raise _unreadable(weights.origin, error) from error
    return transformer


def empty_transformer(
    config: Mapping[str, Any], options: Mapping[str, object], origin: Path
) -> FlowMapFluxTransformer2DModel:
    """The transformer of a diffusers config on the meta device: names and shapes without memory.

    Raises:
        CheckpointError: a value of the config is impossible.
    """
    try:
        with torch.device("meta"):
            transformer: FlowMapFluxTransformer2DModel = FlowMapFluxTransformer2DModel.from_config(
                {**config, **options, "_class_name": FlowMapFluxTransformer2DModel.__name__}
            )
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise _unreadable(origin, error) from error
    return transformer


def transformer_shapes(transformer: FlowMapFluxTransformer2DModel) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the state dict."""
    return {name: tuple(x.shape) for name, x in transformer.state_dict().items()}


def some(names: Sequence[str]) -> str:
    """At most five of the names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        # clones, because published tensors may share a storage, which safetensors refuses
        save_file({name: x.clone().contiguous() for name, x in shard.items()}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _stored_shapes(weights: WeightFiles) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file, names in _by_file(weights.files):
        with safe_open(str(file), framework="pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    return shapes


def _windows(weights: WeightFiles, shapes: Shapes) -> Iterator[dict[str, Tensor]]:
    """All tensors, file by file, as many at a time as fit a window; at least one."""
    for file, names in _by_file(weights.files):
        pending = list(names)
        while pending:
            chunk: dict[str, Tensor] = {}
            size = 0
            with safe_open(str(file), framework="pt") as opened:
                while pending and size < _WINDOW_BYTES:
                    tensor: Tensor = opened.get_tensor(pending[0])
                    chunk[pending.pop(0)] = tensor
                    size += tensor.nbytes
            yield chunk


def _by_file(files: Mapping[str, Path]) -> Iterator[tuple[Path, list[str]]]:
    ordered = sorted(files, key=lambda name: (str(files[name]), name))
    for file, names in groupby(ordered, key=lambda name: files[name]):
        yield file, list(names)


def stored_names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with safe_open(str(file), framework="pt") as opened:
        return list(opened.keys())


def _unreadable(origin: Path, error: BaseException) -> CheckpointError:
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return CheckpointError(f"{origin} cannot be loaded: {reason}", "Restore it from where the model came from.")
