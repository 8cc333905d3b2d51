"""Content hashes of weights: to prove that a base did not move, and that an adapter meets the base it was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fmg.core.errors import CheckpointError
from fmg.models.common.adapter import base_tensors
from fmg.models.common.reader import TensorReader
from fmg.models.common.weights import WeightFiles


def live_digest(module: nn.Module, base: Mapping[str, Tensor] = MappingProxyType({})) -> str:
    """Sha256 over the base weights in memory: every tensor of the state dict that is not part of an adapter.

    `base` has the values of weights that are trained themselves, which stand for those in the module.
    """
    tensors = {**base_tensors(module), **base}
    return tensors_digest((name, tensors[name]) for name in sorted(tensors))


def stored_digest(weights: WeightFiles) -> str:
    """Sha256 over the weights as their files store them.

    It does not depend on how they are sharded, nor on the dtype and device they are loaded to, and equals
    `live_digest` of a module loaded in the stored dtype. Tensors are read one at a time.

    Raises:
        CheckpointError: a weight file is missing or damaged.
    """
    try:
        return tensors_digest(_stored_tensors(weights))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"The weights in {weights.origin} cannot be read: {error}", "Restore them from where the model came from."
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
