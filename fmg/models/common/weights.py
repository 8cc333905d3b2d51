"""Weights of a transformer: safetensors files, single or sharded, checked by name and shape, streamed into place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fmg.core.display import some
from fmg.core.errors import CheckpointError, FmgError, out_of_memory, reason
from fmg.core.json_io import write_json
from fmg.core.model_folder import RESTORE, main_weights, weight_map
from fmg.models.common.adapter import base_tensors

INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"
SHARD = "diffusion_pytorch_model-{:05d}-of-{:05d}.safetensors"
FLOATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Dtypes that weights are read from, by the names that safetensors files give them. 8-bit numbers have no scale: they
are widened when read, and only an unchanged base is ever written in them."""
WINDOW_BYTES = 64 * 2**20
"""Bytes read before a file is reopened: mapped pages count as the process's memory until it is closed."""

Shapes = Mapping[str, tuple[int, ...]]
T = TypeVar("T", bound=nn.Module)


@dataclass(frozen=True)
class WeightFiles:
    """Tensors of safetensors files: where they came from, and the file of each by name."""

    origin: Path
    files: Mapping[str, Path]


def folder_weights(folder: Path) -> WeightFiles:
    """The tensors of a diffusers component folder, in one file or sharded.

    Raises:
        CheckpointError: there is no main safetensors file (`main_weights`), or it or its index cannot be read.
    """
    main = main_weights(folder)
    if main.name.endswith(".json"):
        return WeightFiles(folder, weight_map(main))
    return WeightFiles(folder, dict.fromkeys(tensor_names(main), main))


def check_names(wanted: Shapes, given: Shapes, origin: Path) -> None:
    """Refuses weights with missing, unexpected or wrongly shaped tensors.

    Raises:
        CheckpointError: naming them.
    """
    absent, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
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
                "Give the file and the config of the same model.",
            )


def check_flow_map(
    wanted: Shapes,
    given: Shapes,
    origin: Path,
    *,
    second: str,
    lacks: str = "Name the files with the embedder in model.adapters, in the order in which they were trained.",
    has: str = "Give the weights of a single-time map.",
) -> None:
    """`check_names`, with a hint if only the second-time embedder differs.

    Args:
        wanted, given, origin: as in `check_names`.
        second: path of that embedder in the transformer.
        lacks: what to do about weights without it.
        has: what to do about weights with one that the map does not use.

    Raises:
        CheckpointError: the names or shapes do not fit.
    """
    absent, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if absent and all(name.startswith(f"{second}.") for name in absent) and not extra:
        raise CheckpointError(
            f"The weights in {origin} have missing keys: {some(absent)}, the second-time embedder of a two-time map",
            lacks,
        )
    if extra and all(name.startswith(f"{second}.") for name in extra) and not absent:
        raise CheckpointError(
            f"The weights in {origin} have unexpected keys: {some(extra)}, which a single-time map does not have", has
        )
    check_names(wanted, given, origin)


def load_transformer(
    cls: type[T],
    config: Mapping[str, Any],
    weights: WeightFiles,
    device: torch.device,
    dtype: torch.dtype,
    check: Callable[[Shapes, Shapes, Path], None] = check_names,
) -> T:
    """A transformer with exactly these tensors, streamed straight to `device` in `dtype`.

    The modules are created without memory, and each tensor goes from its file to its destination, so host memory has at
    most one window of a file, besides a model on the CPU.

    Args:
        cls: class of the transformer, a diffusers model.
        config: its config.
        weights: its tensors.
        device: where it goes.
        dtype: dtype of its weights.
        check: refuses names and shapes that do not fit, as `check_names` does.

    Raises:
        CheckpointError: the config does not describe a transformer, or the tensors do not fit it.
    """
    transformer = empty_transformer(cls, config, weights.origin)
    wanted = transformer_shapes(transformer)
    try:
        check(wanted, stored_shapes(weights), weights.origin)
        for chunk in weight_windows(weights):
            placed = {n: x.to(device=device, dtype=kept_dtype(cls, n, dtype), copy=True) for n, x in chunk.items()}
            transformer.load_state_dict(placed, strict=False, assign=True)
    except (OSError, SafetensorError, KeyError) as error:
        raise unreadable(weights.origin, error) from error
    return transformer


def kept_dtype(cls: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor in a network of `dtype`: a class of diffusers may keep some of its modules in fp32."""
    kept = getattr(cls, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if set(kept) & set(name.split(".")) else dtype


def empty_transformer(cls: type[T], config: Mapping[str, Any], origin: Path) -> T:
    """The transformer of a diffusers config on the meta device: names and shapes without memory.

    Raises:
        CheckpointError: a value of the config is impossible.
    """
    try:
        with torch.device("meta"):
            transformer: T = cls.from_config({**config, "_class_name": cls.__name__})  # type: ignore[attr-defined]
    except Exception as error:
        # constructors raise anything on a value they do not expect
        if isinstance(error, FmgError) or out_of_memory(error) is not None:
            raise
        raise unreadable(origin, error) from error
    return transformer


def transformer_shapes(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the state dict."""
    return {name: tuple(x.shape) for name, x in transformer.state_dict().items()}


def stored_shapes(weights: WeightFiles, known: Collection[str] = FLOATS) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors by the headers of their files.

    Args:
        weights: the files.
        known: types that a tensor may be stored in.

    Raises:
        CheckpointError: a tensor is stored in an unknown type, as quantised weights are.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file, names in _by_file(weights.files):
        with safe_open(str(file), framework="pt") as opened:
            for name in names:
                stored = opened.get_slice(name)
                check_dtype(name, stored.get_dtype(), file, known)
                shapes[name] = tuple(stored.get_shape())
    return shapes


def check_dtype(name: str, stored: str, file: Path, known: Collection[str]) -> None:
    """Checks that a tensor is stored in a known type.

    Raises:
        CheckpointError: it is not; quantised weights, for instance, would be misread.
    """
    if stored not in known:
        raise CheckpointError(
            f"'{name}' in {file} is stored as {stored}, but weights can be read only from {', '.join(FLOATS)}",
            "Give weights that are not quantised, such as the bf16 ones they were made from.",
        )


def weight_windows(weights: WeightFiles) -> Iterator[dict[str, Tensor]]:
    """All tensors, file by file, as many at a time as fit into a window; at least one."""
    for file, names in _by_file(weights.files):
        pending = list(names)
        while pending:
            chunk: dict[str, Tensor] = {}
            size = 0
            with safe_open(str(file), framework="pt") as opened:
                while pending and size < WINDOW_BYTES:
                    tensor: Tensor = opened.get_tensor(pending[0])
                    chunk[pending.pop(0)] = tensor
                    size += tensor.nbytes
            yield chunk


def _by_file(files: Mapping[str, Path]) -> Iterator[tuple[Path, list[str]]]:
    ordered = sorted(files, key=lambda name: (str(files[name]), name))
    for file, names in groupby(ordered, key=lambda name: files[name]):
        yield file, list(names)


def tensor_names(file: Path) -> list[str]:
    """Names in a safetensors file.

    Raises:
        CheckpointError: it is missing or not a safetensors file.
    """
    try:
        with safe_open(str(file), framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise unreadable(file, error) from error


def write_index(folder: Path, total: int, files: Mapping[str, str]) -> None:
    """Writes the index of sharded weights, as diffusers does: their bytes, and the name of the file of each tensor."""
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(files)})


def check_loaded(folder: Path, info: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
    """Checks what a library's `from_pretrained` tells of the weights that it loaded.

    Raises:
        CheckpointError: weights were missing, unexpected or wrongly shaped, where the library only warns.
    """
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := [name for name in info[problem] if name not in ignored]:
            raise CheckpointError(f"The weights in {folder} have {problem.replace('_', ' ')}: {some(names)}", RESTORE)


def unreadable(origin: Path, error: BaseException) -> CheckpointError:
    """The error for weights that a library cannot read, with the first line of its reason."""
    return CheckpointError(f"{origin} cannot be loaded: {reason(error)}", "Restore it from where the model came from.")


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
        aliases: names that tensors have in their files, where they differ.
    """

    def __init__(self, files: Mapping[str, Path], aliases: Mapping[str, str] | None = None) -> None:
        self._files = files
        self._aliases = aliases or {}
        self._file: Path | None = None
        self._opened: Any = None
        self._size = 0

    @classmethod
    def of(cls, file: Path) -> TensorReader:
        """All tensors of one file; errors as `tensor_names`."""
        return cls(dict.fromkeys(tensor_names(file), file))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._files))

    def under(self, other: TensorReader) -> TensorReader:
        """These tensors, replaced by those of `other` with the same name; for readers without aliases."""
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


def live_digest(module: nn.Module, base: Mapping[str, Tensor] = MappingProxyType({})) -> str:
    """Sha256 over the base weights in memory: every tensor of the state dict that is not part of an adapter.

    `base` has the base values of base weights that were trained; they replace those in the module.
    """
    tensors = {**base_tensors(module), **base}
    return tensors_digest((name, tensors[name]) for name in sorted(tensors))


def stored_digest(weights: WeightFiles) -> str:
    """Sha256 over the weights as stored in their files.

    It does not depend on how they are sharded, nor on the dtype and device they are loaded to, and equals
    `live_digest` of a module loaded in the stored dtype. Tensors are read one at a time.

    Raises:
        CheckpointError: a weight file is missing or damaged.
    """
    try:
        return tensors_digest(_stored_tensors(weights))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"The weights in {weights.origin} cannot be read: {reason(error)}",
            "Restore them from where the model came from.",
        ) from error


def _stored_tensors(weights: WeightFiles) -> Iterator[tuple[str, Tensor]]:
    reader = TensorReader(weights.files)
    for name in sorted(weights.files):
        yield name, reader.read(name)


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Sha256 over names, dtypes, shapes and values, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
