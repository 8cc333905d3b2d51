"""Trained weights on disk: an adapter with the weights trained beside it, or a fully tuned transformer.

`checkpoint_files` names the files. The formats are those of diffusers and PEFT, with a manifest of what the weights
belong to. The manifest of an adapter names the tensors of `fmg_extra.safetensors`. A reader that left them out would
return only half of what was trained, so a missing file is an error, and so is a file that the manifest does not name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fmg.core.errors import CheckpointError, UsageError, reason
from fmg.core.files import atomic_folder
from fmg.core.hub import cached_place
from fmg.core.json_io import JsonError, read_object
from fmg.models.common.adapter import ADAPTER, adapter_parameters, adapter_shapes
from fmg.models.common.checkpoint_files import (
    ADAPTER_MANIFEST,
    COMPONENT,
    DIFFUSERS_FILE,
    EXTRA_FILE,
    PEFT_CONFIG_FILE,
    PEFT_FILE,
    PEFT_FOLDER,
    TRANSFORMER_MANIFEST,
)
from fmg.models.common.weights import (
    WeightFiles,
    check_names,
    folder_weights,
    kept_dtype,
    stored_digest,
    stored_shapes,
    unreadable,
    weight_windows,
    write_index,
)
from fmg.models.conventions import FlowMapConventions

M = TypeVar("M", bound=BaseModel)

DIFFUSERS_PREFIX = "transformer."
PEFT_PREFIX = "base_model.model."
LORA_A, LORA_B, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"


class BaseReference(BaseModel):
    """The weights that an adapter was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Registered name of the model.")
    digest: str = Field(description="Sha256 of the stored transformer weights.")
    repository: str | None = Field(default=None, description="Hub id of the weights; null for a local file or folder.")
    commit: str | None = Field(default=None, description="Commit of the hub repository that they were fetched at.")

    @classmethod
    def of(cls, name: str, weights: WeightFiles) -> BaseReference:
        """The reference of a model by its weight files; hashes them, and reads hub id and commit from their path."""
        place = cached_place(weights.origin)
        repository, commit = (None, None) if place is None else (place[0].repository, place[0].revision)
        return cls(name=name, digest=stored_digest(weights), repository=repository, commit=commit)


class AdapterManifest(BaseModel):
    """The content of `fmg_adapter.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = Field(default=1, alias="schema", description="Version of this file's layout.")
    base: BaseReference = Field(description="What the adapter was trained on.")
    map: FlowMapConventions = Field(description="Kind of map, path and time convention of the base.")
    rank: int = Field(gt=0, description="Rank of the LoRA.")
    alpha: float = Field(gt=0, description="Scale of the LoRA, divided by the rank.")
    dropout: float = Field(ge=0, lt=1, description="Dropout on the input of A during training.")
    targets: tuple[str, ...] = Field(description="Suffixes of the names of the adapted modules.")
    extra: tuple[str, ...] = Field(
        default=(), description="Names of trained base weights, which replace those of the base."
    )


def save_adapter(
    folder: Path,
    transformer: Any,
    pipeline: Any,
    base: BaseReference,
    conventions: FlowMapConventions,
    check: Callable[[Path], object],
    extra: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    alpha_tensors: bool = False,
) -> None:
    """Writes the adapter of `transformer` to a new folder; either all of it appears or nothing.

    Args:
        folder: where; must not exist.
        transformer: has the adapter.
        pipeline: class of diffusers whose `load_lora_weights` must read it.
        base: the model that the adapter was trained on.
        conventions: how it is sampled.
        check: verifies the folder before it appears under its name; when it raises, nothing is kept.
        extra: base weights that were trained, by their names in the state dict.
        alpha_tensors: state alpha as a tensor beside each module, which ComfyUI reads as well as `pipeline`; else in
            the metadata of the file, which only diffusers reads. A reader accepts one of the two, never both.

    Raises:
        UsageError: there is no adapter, or the folder exists.
    """
    tensors = {name: p.detach().cpu().contiguous() for name, p in adapter_parameters(transformer).items()}
    if not tensors:
        raise UsageError("There is no adapter to save", "Call attach_adapter before save_adapter.")
    config = transformer.peft_config[ADAPTER]
    manifest = AdapterManifest(
        base=base,
        map=conventions,
        rank=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=tuple(sorted(config.target_modules)),
        extra=tuple(sorted(extra)),
    )
    # PEFT keeps the targets in a set, whose order would change from run to run
    stated = {**config.to_dict(), "target_modules": list(manifest.targets)}
    with atomic_folder(folder) as partial:
        modules = [name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)] if alpha_tensors else []
        pipeline.save_lora_weights(
            str(partial),
            transformer_lora_layers=tensors
            | {module + ALPHA: torch.tensor(float(config.lora_alpha)) for module in modules},
            transformer_lora_adapter_metadata=None if alpha_tensors else stated,
        )
        peft = partial / PEFT_FOLDER
        peft.mkdir()
        _write_text(peft / PEFT_CONFIG_FILE, json.dumps(stated, indent=2, sort_keys=True))
        save_file({PEFT_PREFIX + name: x for name, x in tensors.items()}, peft / PEFT_FILE, metadata={"format": "pt"})
        if extra:
            stored = {DIFFUSERS_PREFIX + name: x.detach().cpu().contiguous() for name, x in extra.items()}
            save_file(stored, partial / EXTRA_FILE, metadata={"format": "pt"})
        _write_text(partial / ADAPTER_MANIFEST, manifest.model_dump_json(indent=2, by_alias=True))
        check(partial)


def read_adapter_manifest(folder: Path) -> AdapterManifest:
    """The manifest of a saved adapter.

    Raises:
        CheckpointError: the folder or its manifest is missing, unreadable or has an unsupported schema.
    """
    file = folder / ADAPTER_MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{folder} is not an adapter: it has no {file.name}", "Give a folder that fmg saved.")
    return _read_manifest(file, AdapterManifest)


def read_adapter_on(
    transformer: nn.Module,
    folder: Path,
    manifest: AdapterManifest,
    base: Mapping[str, tuple[int, ...]],
    unused: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The tensors of a saved adapter, after checking that they fit a network.

    Args:
        transformer: the network.
        folder: what `save_adapter` wrote.
        manifest: its manifest.
        base: names and shapes of the weights of the base that an adapter may replace.
        unused: modules that no adapter adapts.

    Raises:
        CheckpointError: a file is missing or damaged, or they do not fit.
    """
    extra = extra_shapes(folder, manifest, base)
    try:
        lora = adapter_shapes(transformer, manifest.targets, manifest.rank, unused)
    except UsageError as error:
        raise CheckpointError(
            f"The adapter in {folder} does not fit the model: {error.what}",
            "Load it into the model it was trained on.",
        ) from None
    return read_adapter_tensors(folder, lora | extra)


def read_adapter_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a saved adapter by their names without prefix: the LoRA's, and those trained beside it.

    Alpha, which the manifest states, is not among them.

    Args:
        folder: what `save_adapter` wrote.
        shapes: the exact names and shapes that are required. A reader that only knows LoRAs gets an error for an
            adapter with more than a LoRA.

    Raises:
        CheckpointError: a file is missing or damaged, or names, shapes or values are wrong.
    """
    file, tensors = folder / DIFFUSERS_FILE, read_saved_tensors(folder)
    wrong = (
        *(f"{name} is missing" for name in sorted(shapes.keys() - tensors.keys())),
        *(f"{name} is unknown" for name in sorted(tensors.keys() - shapes.keys())),
        *(
            f"{name} has shape {tuple(tensors[name].shape)} instead of {shapes[name]}"
            for name in sorted(shapes.keys() & tensors.keys())
            if tuple(tensors[name].shape) != shapes[name]
        ),
        *(f"{name} is not finite" for name in sorted(tensors) if not bool(torch.isfinite(tensors[name]).all())),
    )
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{file} does not fit the model: {wrong[0]}{more}", "Load it into the model it was trained on."
        )
    return tensors


def read_saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the files of a saved adapter but alpha, by its name without prefix, unchecked.

    A name without the prefix, which no saved adapter has, is kept with a dot before it.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    stored = _read(folder / DIFFUSERS_FILE)
    alphas = {name.removesuffix(LORA_A) + ALPHA for name in stored if name.endswith(LORA_A)}
    if (folder / EXTRA_FILE).exists():
        stored |= _read(folder / EXTRA_FILE)
    return {
        name.removeprefix(DIFFUSERS_PREFIX) if name.startswith(DIFFUSERS_PREFIX) else f".{name}": x
        for name, x in stored.items()
        if name not in alphas
    }


def extra_shapes(
    folder: Path, manifest: AdapterManifest, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the base weights that were trained, for `read_adapter_tensors`.

    Args:
        folder: what `save_adapter` wrote.
        manifest: its manifest.
        shapes: names and shapes of the weights of the base.

    Raises:
        CheckpointError: their file is missing, or the base has no such weights.
    """
    if manifest.extra and not (folder / EXTRA_FILE).is_file():
        raise CheckpointError(
            f"{folder} lacks {EXTRA_FILE}, the weights that were trained beside the LoRA",
            "Restore it: the adapter is incomplete without it.",
        )
    unknown = sorted(set(manifest.extra) - shapes.keys())
    if unknown:
        raise CheckpointError(
            f"The adapter in {folder} trains {unknown[0]}, which the model does not have",
            "Load it into the model it was trained on.",
        )
    return {name: shapes[name] for name in manifest.extra}


def _read(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {reason(error)}", "Restore it or save the adapter again."
        ) from error
    return tensors


def _write_text(file: Path, text: str) -> None:
    file.write_text(text + "\n", encoding="utf-8")


_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
_SHARD = "5GB"


class TransformerManifest(BaseModel):
    """The content of `fmg_transformer.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = Field(default=1, alias="schema", description="Version of this file's layout.")
    base: BaseReference = Field(description="What the transformer was tuned from.")
    map: FlowMapConventions = Field(description="Kind of map, path and time convention.")


def save_transformer(
    folder: Path,
    transformer: Any,
    base: BaseReference,
    conventions: FlowMapConventions,
    dtype: torch.dtype,
    check: Callable[[Path], object],
) -> None:
    """Writes every weight of `transformer` in `dtype` to a new folder, sharded; all of it appears or nothing.

    Args:
        folder: where; must not exist.
        transformer: a model of diffusers without an adapter.
        base: the model that it was tuned from.
        conventions: how it is sampled.
        dtype: dtype of the stored weights; they are converted one shard at a time.
        check: verifies the folder before it appears under its name; when it raises, nothing is kept.

    Raises:
        UsageError: the folder exists.
    """
    manifest = TransformerManifest(base=base, map=conventions)
    with atomic_folder(folder) as partial:
        component = partial / COMPONENT
        transformer.save_config(str(component))
        _write_weights(component, transformer, dtype)
        _write_text(partial / TRANSFORMER_MANIFEST, manifest.model_dump_json(indent=2, by_alias=True))
        check(partial)


def read_transformer_manifest(folder: Path) -> TransformerManifest:
    """The manifest of a fully tuned transformer.

    Raises:
        CheckpointError: it is missing, unreadable or has an unsupported schema.
    """
    return _read_manifest(folder / TRANSFORMER_MANIFEST, TransformerManifest)


def load_transformer_weights(transformer: nn.Module, folder: Path) -> None:
    """Loads the saved weights, streamed, in the dtype and on the device of the transformer.

    Nothing changes when it fails.

    Raises:
        CheckpointError: a file is missing or damaged, or names, shapes or values are wrong.
    """
    weights = folder_weights(folder / COMPONENT)
    places: Mapping[str, Tensor] = transformer.state_dict()
    try:
        check_names({name: tuple(x.shape) for name, x in places.items()}, stored_shapes(weights), weights.origin)
        for chunk in weight_windows(weights):
            for name, tensor in chunk.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise CheckpointError(f"{name} in {weights.origin} is not finite", "Use another checkpoint.")
        with torch.no_grad():
            for chunk in weight_windows(weights):
                for name, tensor in chunk.items():
                    places[name].copy_(tensor)
    except (OSError, SafetensorError, KeyError) as error:
        raise unreadable(weights.origin, error) from error


def _write_weights(component: Path, transformer: nn.Module, dtype: torch.dtype) -> None:
    tensors = transformer.state_dict()
    planned = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=_PATTERN, max_shard_size=_SHARD)
    total = 0
    for file, names in planned.filename_to_tensors.items():
        kept = {name: kept_dtype(type(transformer), name, dtype) for name in names}
        shard = {name: tensors[name].detach().to("cpu", kept[name]).contiguous() for name in names}
        total += sum(x.nbytes for x in shard.values())
        save_file(shard, component / file, metadata={"format": "pt"})
    if planned.is_sharded:
        write_index(component, total, planned.tensor_to_filename)


def _read_manifest(file: Path, cls: type[M]) -> M:
    try:
        return cls.model_validate(read_object(file))
    except (OSError, JsonError, ValidationError) as error:
        raise CheckpointError(
            f"{file} cannot be used: {reason(error)}", "Use the version of fmg that wrote it, or train again."
        ) from None
