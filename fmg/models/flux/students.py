"""The published file of a FLUX student: made safe once, and checked for the mistakes that are likely with it.

A torch file is read once with `weights_only=True` and memory-mapped, and converted to safetensors shards in the cache
under the hash of its content. Safetensors files, single or sharded, are read where they are.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fmg.core.cache import cache_dir, content_hash, made_once, required_cache
from fmg.core.errors import CheckpointError
from fmg.models.common.weights import (
    INDEX_FILE,
    Shapes,
    WeightFiles,
    check_names,
    folder_weights,
    some,
    tensor_names,
    unreadable,
)

PUBLISHED_KEY = "module"
DROPPED_PREFIX = "logvar_linear."
"""The one group of a published student that sampling does not need: the weighting head of sCM's training loss."""

_SECOND = "timestep_embedder2."
_SHARD_BYTES = 2 * 10**9


def student_weights(source: Path, shapes: Shapes) -> WeightFiles:
    """The tensors of a published student: a `.pt` file, a safetensors file or a component folder.

    Args:
        source: a torch file is converted to the cache first, unless that was done before.
        shapes: names and shapes that the transformer has; checked before anything is converted.

    Raises:
        CheckpointError: a file that cannot be read, holds anything but tensors, or does not fit the transformer.
        FmgError: the cache cannot be written.
    """
    if source.is_dir():
        return folder_weights(source)
    try:
        if source.suffix == ".safetensors":
            kept = [name for name in tensor_names(source) if not name.startswith(DROPPED_PREFIX)]
            return WeightFiles(source, dict.fromkeys(kept, source))
        folder = cache_dir() / "models" / content_hash(source)
    except (OSError, SafetensorError) as error:
        raise unreadable(source, error) from error

    def make(partial: Path) -> None:
        tensors = {n: x for n, x in read_torch_file(source).items() if not n.startswith(DROPPED_PREFIX)}
        check_student(shapes, {name: tuple(x.shape) for name, x in tensors.items()}, source)
        _write_shards(partial, tensors)

    with required_cache():
        return WeightFiles(source, folder_weights(made_once(folder, make)).files)


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
        with warnings.catch_warnings():
            # what torch thinks of a pickle's version says nothing to somebody who gave the wrong file
            warnings.simplefilter("ignore", UserWarning)
            loaded = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is no checkpoint of tensors: what else a torch file holds is not loaded, because it can run code",
            "Give the published student, or plain tensors as .safetensors.",
        ) from error
    except (EOFError, LookupError, AttributeError, TypeError) as error:
        # the unpickler's way of saying that it met neither tensors nor code
        raise CheckpointError(f"{file} is not a torch file", "Give the student's checkpoint file.") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise unreadable(file, error) from error
    inner = loaded.get(PUBLISHED_KEY, loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(inner, Mapping) or not inner or not all(isinstance(x, Tensor) for x in inner.values()):
        raise CheckpointError(
            f"{file} is not a published student: it has no mapping of names to tensors under '{PUBLISHED_KEY}'",
            "Give the student's checkpoint file.",
        )
    return {str(name): tensor for name, tensor in inner.items()}


def check_student(wanted: Shapes, given: Shapes, origin: Path) -> None:
    """`check_names`, with a word on the likely mistake where the second time embedder is concerned.

    Raises:
        CheckpointError: the names or shapes do not fit.
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
    check_names(wanted, given, origin)


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
