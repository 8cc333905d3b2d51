"""Content hashes of weights: to prove that a base did not move, and that an adapter meets the base it was made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fmg.core.errors import CheckpointError
from fmg.models.flux.adapter import base_name, is_adapter

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"


def live_digest(module: nn.Module) -> str:
    """Sha256 over the base weights in memory: every tensor of the state dict that is not part of an adapter."""
    tensors = {base_name(name): x for name, x in module.state_dict().items() if not is_adapter(name)}
    return _digest((name, tensors[name]) for name in sorted(tensors))


def stored_digest(folder: Path) -> str:
    """Sha256 over the weights as a diffusers component folder stores them.

    It does not depend on how they are sharded, nor on the dtype and device they are loaded to, and equals
    `live_digest` of a module loaded in the stored dtype. Tensors are read one at a time.

    Raises:
        CheckpointError: a weight file is missing or damaged.
    """
    try:
        return _digest(_stored_tensors(folder))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"The weights in {folder} cannot be read: {error}", "Restore the folder from where the model came from."
        ) from error


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    index = folder / INDEX_FILE
    if index.is_file():
        files: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as stored:
            files = dict.fromkeys(stored.keys(), WEIGHTS_FILE)
    opened = {name: safe_open(str(folder / name), framework="pt") for name in sorted(set(files.values()))}
    for name in sorted(files):
        tensor: Tensor = opened[files[name]].get_tensor(name)  # type: ignore[no-untyped-call]
        yield name, tensor


def _digest(tensors: Iterator[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
