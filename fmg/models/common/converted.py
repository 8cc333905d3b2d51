"""Weights in another format, such as a torch file, converted once into safetensors shards in the cache."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fmg.core.cache import cache_dir, made_once, required_cache
from fmg.core.errors import CheckpointError
from fmg.models.common.weights import SHARD, WeightFiles, folder_weights, unreadable, write_index

_SHARD_BYTES = 2 * 10**9


def kept_weights(origin: Path, key: str, make: Callable[[Path], None]) -> WeightFiles:
    """Weights in the cache, converted if they are not there yet.

    Args:
        origin: the source of the weights, for messages.
        key: hash of everything they depend on.
        make: writes them to an empty folder with `write_shards`.

    Raises:
        FmgError: the cache cannot be written.
    """
    with required_cache():
        return WeightFiles(origin, folder_weights(made_once(cache_dir() / "models" / key, make)).files)


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes tensors as shards with an index, as diffusers does; memory holds one shard at a time."""
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        file = folder / f"{len(shards)}.tmp"
        # clones, because published tensors may share a storage, which safetensors refuses
        save_file({name: x.clone().contiguous() for name, x in pending.items()}, file, metadata={"format": "pt"})
        shards.append((file, list(pending)))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > _SHARD_BYTES:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    index: dict[str, str] = {}
    for number, (file, names) in enumerate(shards, start=1):
        index |= dict.fromkeys(names, file.rename(folder / SHARD.format(number, len(shards))).name)
    write_index(folder, total, index)


def read_torch_file(file: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a torch file, under `key` or at the top; memory-mapped, on the CPU.

    Raises:
        CheckpointError: a file that is missing, truncated, not a torch file, or contains anything but tensors.
    """
    try:
        if not zipfile.is_zipfile(file):
            with file.open("rb") as opened:
                damaged = opened.read(2) == b"PK" or file.stat().st_size == 0
            if damaged:
                raise CheckpointError(f"{file} is truncated", "Fetch or copy it again.")
        with warnings.catch_warnings():
            # torch's warning about the version of a pickle does not help somebody who gave the wrong file
            warnings.simplefilter("ignore", UserWarning)
            loaded = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is not a checkpoint of plain tensors: other contents of a torch file can run code, so"
            " they are not loaded",
            "Give the published file, or plain tensors as .safetensors.",
        ) from error
    except (EOFError, LookupError, AttributeError, TypeError) as error:
        # what the unpickler raises when it finds neither tensors nor code
        raise CheckpointError(f"{file} is not a torch file", "Give a checkpoint of tensors.") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise unreadable(file, error) from error
    inner = loaded.get(key, loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(inner, Mapping) or not inner or not all(isinstance(x, Tensor) for x in inner.values()):
        raise CheckpointError(
            f"{file} has no mapping of names to tensors under '{key}' or at the top",
            "Give a checkpoint of tensors.",
        )
    return {str(name): tensor for name, tensor in inner.items()}
