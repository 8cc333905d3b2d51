"""A run as a complete diffusers folder: the adapter merged into the base weights, one shard in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.events import Observer, StageProgress, ignore
from fmg.inference.target import resolve_target
from fmg.models.common.adapter_files import AdapterManifest, extra_shapes, new_folder, read_manifest, read_tensors
from fmg.models.common.digest import stored_digest
from fmg.models.common.full_files import is_full
from fmg.models.common.weights import INDEX_FILE, folder_weights
from fmg.models.configs import EmbeddedConfig
from fmg.models.lora_presets import expand_targets, is_target
from fmg.training.card import CARD, SAMPLES

TRANSFORMER = "transformer"
DTYPES: Mapping[str, torch.dtype | None] = {
    "stored": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_WEIGHTS = "*.safetensors"
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Merged:
    """What an export wrote: where, how many weights the adapter changed, of how many."""

    folder: Path
    changed: int
    tensors: int


def export_diffusers(
    target: str | Path | None, out: Path, *, dtype: str = "stored", observer: Observer = ignore
) -> Merged:
    """Writes the pipeline of a run, adapter merged, as a new diffusers folder.

    Args:
        target: a run folder, or None for the newest run.
        out: the folder to make.
        dtype: of the merged transformer: `stored`, `fp32`, `bf16` or `fp16`. The sums are made in fp32.
        observer: hears of every shard.

    Raises:
        UsageError: the target has no adapter, its base is no folder on this computer, or `out` exists.
        CheckpointError: base and adapter do not belong together, or a file is damaged; nothing is left behind.
    """
    found = resolve_target(target)
    config = found.recipe.model.config
    if found.adapter is None:
        raise UsageError(f"'{found.label}' has no adapter to merge", "Name a run folder; `fmg runs` lists them.")
    if not isinstance(config, EmbeddedConfig):
        raise UsageError(
            f"The base of '{found.label}', {found.recipe.model.name}, is not one diffusers folder",
            "Load the adapter with `pipe.load_lora_weights` instead.",
        )
    return merge_folder(config.directory(), found.adapter, out, dtype=DTYPES[dtype], observer=observer)


def merge_folder(
    base: Path, adapter: Path, out: Path, *, dtype: torch.dtype | None = None, observer: Observer = ignore
) -> Merged:
    """Merges a saved adapter into a copy of its base folder; either all of `out` appears or nothing.

    Args:
        base: a diffusers pipeline folder with its `fmg_flow_map.json`.
        adapter: what `save_adapter` wrote.
        out: the folder to make.
        dtype: of the transformer's floating-point weights; None keeps the stored one.
        observer: hears of every shard.

    Raises:
        UsageError: `out` exists.
        CheckpointError: the adapter was made for other weights, names an unknown module, or a file is damaged.
    """
    if is_full(adapter):
        raise UsageError(
            f"{adapter} is a whole transformer, so there is nothing to merge",
            f"Use its folder {adapter / TRANSFORMER} in place of the pipeline's own.",
        )
    manifest = read_manifest(adapter)
    weights = base / TRANSFORMER
    if manifest.base.digest != stored_digest(folder_weights(weights)):
        raise CheckpointError(
            f"The adapter in {adapter} was trained on other weights of '{manifest.base.name}' than those in {base}",
            f"Give the folder it was trained on (sha256 {manifest.base.digest[:12]}).",
        )
    shards = sorted(weights.glob(_WEIGHTS))
    shapes = {name: shape for shard in shards for name, shape in _shapes(shard)}
    extra = extra_shapes(adapter, manifest, shapes)
    tensors = read_tensors(adapter, {**_adapter_shapes(shapes, manifest), **extra})
    changed = 0
    with new_folder(out) as partial:
        shutil.copytree(base, partial, dirs_exist_ok=True, ignore=_without_transformer_weights(base))
        for number, shard in enumerate(shards, start=1):
            changed += _merge_shard(shard, partial / TRANSFORMER / shard.name, tensors, manifest, dtype)
            observer(StageProgress("export", number, len(shards)))
        if dtype is not None:
            _restate_size(partial / TRANSFORMER)
        for name in (CARD, SAMPLES):
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, partial / name)
    return Merged(out, changed, len(shapes))


def _merge_shard(
    shard: Path, out: Path, adapter: Mapping[str, Tensor], manifest: AdapterManifest, dtype: torch.dtype | None
) -> int:
    """Writes one shard of the merged transformer; returns the number of weights that the adapter changed."""
    scale = manifest.alpha / manifest.rank
    merged: dict[str, Tensor] = {}
    changed = 0
    with safe_open(str(shard), framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            tensor: Tensor = stored.get_tensor(name)
            kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            module = name.removesuffix(".weight")
            if name in adapter:
                tensor = adapter[name]
                changed += 1
            elif module + _LORA_A in adapter:
                delta = adapter[module + _LORA_B].float() @ adapter[module + _LORA_A].float()
                tensor = tensor.float() + scale * delta
                changed += 1
            merged[name] = tensor.to(kept).contiguous()
    save_file(merged, out, metadata={"format": "pt"})
    return changed


def _adapter_shapes(shapes: Mapping[str, tuple[int, ...]], manifest: AdapterManifest) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the tensors of the adapter must have on these weights."""
    suffixes = expand_targets(manifest.targets)
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and module != name and is_target(module, suffixes):
            outputs, inputs = shape
            expected[module + _LORA_A] = (manifest.rank, inputs)
            expected[module + _LORA_B] = (outputs, manifest.rank)
    return expected


def _shapes(shard: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(str(shard), framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                yield name, tuple(stored.get_slice(name).get_shape())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{shard} cannot be read: {error}", "Restore it from where the model came from."
        ) from error


def _without_transformer_weights(base: Path) -> Callable[[str, list[str]], set[str]]:
    def ignored(folder: str, names: list[str]) -> set[str]:
        inside = Path(folder) == base / TRANSFORMER
        return {name for name in names if inside and name.endswith(".safetensors")}

    return ignored


def _restate_size(folder: Path) -> None:
    """Corrects the total size that a shard index states, after a change of dtype."""
    file = folder / INDEX_FILE
    if file.is_file():
        index = json.loads(file.read_text(encoding="utf-8"))
        index["metadata"]["total_size"] = sum(_bytes(shard) for shard in folder.glob(_WEIGHTS))
        file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _bytes(shard: Path) -> int:
    with safe_open(str(shard), framework="pt") as stored:
        return sum(stored.get_tensor(name).nbytes for name in stored.keys())  # noqa: SIM118
