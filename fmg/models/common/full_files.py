"""A fully tuned transformer on disk: a component folder of diffusers, and a manifest of what it was tuned from.

<folder>/transformer/config.json, diffusion_pytorch_model*.safetensors   `from_pretrained(folder/transformer)`
<folder>/fmg_transformer.json   base, map kind and time convention
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fmg.core.errors import CheckpointError
from fmg.core.files import atomic_folder
from fmg.core.json_io import JsonError, read_object
from fmg.models.common.adapter_files import BaseReference
from fmg.models.common.weights import check_names, folder_weights, stored_shapes, unreadable, weight_windows
from fmg.models.conventions import FlowMapConventions

MANIFEST_FILE = "fmg_transformer.json"
COMPONENT = "transformer"
_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
_INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"
_SHARD = "5GB"


class TransformerManifest(BaseModel):
    """What `fmg_transformer.json` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = Field(default=1, alias="schema", description="Version of this file's layout.")
    base: BaseReference = Field(description="What the transformer was tuned from.")
    map: FlowMapConventions = Field(description="Kind of map, path and time convention.")


def save(
    folder: Path,
    transformer: Any,
    base: BaseReference,
    conventions: FlowMapConventions,
    dtype: torch.dtype,
    prove: Callable[[Path], object],
) -> None:
    """Writes every weight of `transformer` in `dtype` to a new folder, sharded; all of it appears or nothing.

    Args:
        folder: what to make.
        transformer: a model of diffusers without an adapter.
        base: what it was tuned from.
        conventions: how it wants to be sampled.
        dtype: of the stored weights; they are converted one shard at a time.
        prove: gets the folder before it appears under its name; when it raises, nothing is kept.

    Raises:
        UsageError: the folder exists.
    """
    manifest = TransformerManifest(base=base, map=conventions)
    with atomic_folder(folder) as partial:
        component = partial / COMPONENT
        transformer.save_config(str(component))
        _write_weights(component, transformer.state_dict(), dtype)
        text = manifest.model_dump_json(indent=2, by_alias=True)
        (partial / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
        prove(partial)


def is_full(folder: Path) -> bool:
    """Whether a checkpoint is a fully tuned transformer."""
    return (folder / MANIFEST_FILE).is_file()


def read_manifest(folder: Path) -> TransformerManifest:
    """The manifest of a fully tuned transformer.

    Raises:
        CheckpointError: it is missing, unreadable or of another schema.
    """
    file = folder / MANIFEST_FILE
    try:
        return TransformerManifest.model_validate(read_object(file))
    except (OSError, JsonError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"{file} cannot be used: {first}", "Use the version of fmg that wrote it, or train again."
        ) from None


def load_into(transformer: nn.Module, folder: Path) -> None:
    """Takes over the saved weights, streamed, in the dtype and on the device of the transformer.

    Nothing changes when it fails.

    Raises:
        CheckpointError: a file is missing or damaged, or names, shapes or values are not as they must be.
    """
    weights = folder_weights(folder / COMPONENT)
    places: Mapping[str, Tensor] = transformer.state_dict()
    try:
        check_names({name: tuple(x.shape) for name, x in places.items()}, stored_shapes(weights), weights.origin)
        for chunk in weight_windows(weights):
            for name, tensor in chunk.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise CheckpointError(f"{weights.origin} holds {name}, which is not finite", "Use another one.")
        with torch.no_grad():
            for chunk in weight_windows(weights):
                for name, tensor in chunk.items():
                    places[name].copy_(tensor)
    except (OSError, SafetensorError, KeyError) as error:
        raise unreadable(weights.origin, error) from error


def _write_weights(component: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    planned = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=_PATTERN, max_shard_size=_SHARD)
    total = 0
    for file, names in planned.filename_to_tensors.items():
        shard = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in names}
        total += sum(x.nbytes for x in shard.values())
        save_file(shard, component / file, metadata={"format": "pt"})
    if planned.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": planned.tensor_to_filename}
        (component / _INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
