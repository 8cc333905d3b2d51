"""Exports a run as a complete diffusers folder: the adapter merged into the base weights, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from fmg.core.errors import UsageError, python_call
from fmg.core.events import Observer, StageProgress
from fmg.core.files import atomic_folder, check_space
from fmg.export.source import ExportSource, find_source, merged
from fmg.export.weights import TensorType, lay_out, write_weights
from fmg.inference.pipeline import sampled_as
from fmg.inference.target import TargetLike, export_folder, resolve_target
from fmg.models.common.checkpoint_files import CARD, SAMPLES
from fmg.models.common.weights import SHARD, write_index
from fmg.models.flux.configs import FluxStudentConfig
from fmg.models.flux.pipeline_files import STALE, write_pipeline_files
from fmg.progress import watching
from fmg.training.card import folder_card

TRANSFORMER = "transformer"
DTYPES: Mapping[str, torch.dtype | None] = {
    "stored": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_SINGLE_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Merged:
    """Where an export was written, how many weights the adapter changed, and how many there are."""

    folder: Path
    changed: int
    tensors: int


@python_call
def export_diffusers(
    target: TargetLike = None,
    out: str | PathLike[str] | None = None,
    dtype: str = "stored",
    *,
    observer: Observer | None = None,
    progress: bool | None = None,
) -> Merged:
    """Writes the pipeline of a run, with its adapter merged, as a new diffusers folder.

    A student's folder is its teacher's with the student's transformer; `fmg` loads it as the model `flux-fewstep`.

    Args:
        target: a run folder, a student by name, or None for the newest run.
        out: the folder to make; None is `diffusers` in the run's folder.
        dtype: dtype of the transformer: `stored`, `fp32`, `bf16` or `fp16`. The sums are made in fp32.
        observer: receives every shard.
        progress: whether progress is shown, as in `train`.

    Raises:
        UsageError: there is nothing to merge, the model belongs to another family, or `out` exists.
        MissingDependencyError: published files that have not been fetched.
        CheckpointError: base and adapter do not belong together, or a file is damaged; nothing is left behind.
    """
    with watching(observer, progress) as told:
        source = find_source(resolve_target(target, observer=told))
        if source.checkpoint is None and not isinstance(source.recipe.model.config, FluxStudentConfig):
            raise UsageError(f"'{source.label}' has no adapter to merge", "Name a run folder; `fmg runs` lists them.")
        place = export_folder(target, "diffusers") if out is None else Path(out)
        return write_folder(source, place, DTYPES[dtype], told)


def write_folder(source: ExportSource, out: Path, dtype: torch.dtype | None, observer: Observer) -> Merged:
    """Writes the pipeline folder of a source with the changes of its run merged; all of `out`, or nothing.

    Args:
        source: a student's folder is that of its teacher.
        out: the folder to make.
        dtype: dtype of the transformer's floating-point weights; None keeps the stored one.
        observer: receives every shard.

    Raises:
        UsageError: `out` exists, or the disk is too small.
        CheckpointError: a file is damaged, or base and adapter do not belong together.
    """
    if out.exists():
        raise UsageError(f"{out} exists already", "Export to another folder, or move that one away.")
    adapter, delta = source.checkpoint, source.delta
    types = {name: (_dtype(given, dtype), shape) for name, (given, shape) in source.stored.items()}
    others = sum(file.stat().st_size for file in source.folder.rglob("*") if file.is_file())
    check_space(out, others + lay_out(types).size)
    with atomic_folder(out) as partial:
        shutil.copytree(source.folder, partial, dirs_exist_ok=True, ignore=_replaced(source.folder))
        _write_transformer(partial / TRANSFORMER, source, types, observer)
        write_pipeline_files(partial, sampled_as(source.conventions, source.recipe))
        if adapter is not None and (adapter / SAMPLES).is_file():
            shutil.copyfile(adapter / SAMPLES, partial / SAMPLES)
        (partial / CARD).write_text(folder_card(source.recipe, _card_of(adapter), source.merged), encoding="utf-8")
    return Merged(out, 0 if delta is None else len(delta.changed), len(types))


def _card_of(adapter: Path | None) -> str | None:
    if adapter is None:
        return None
    card = adapter / CARD
    return card.read_text(encoding="utf-8") if card.is_file() else ""


def _write_transformer(out: Path, source: ExportSource, types: Mapping[str, TensorType], observer: Observer) -> None:
    """Writes the config, and the weights in as many files as they are stored in."""
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(dict(source.transformer.config)), encoding="utf-8")
    files = source.transformer.weights.files
    shards = sorted(set(files.values()))
    names = {shards[0]: _SINGLE_FILE}
    if len(shards) > 1:
        names = {file: SHARD.format(number, len(shards)) for number, file in enumerate(shards, start=1)}
    for number, file in enumerate(shards, start=1):
        layout = lay_out({name: types[name] for name, home in files.items() if home == file})
        write_weights(out / names[file], layout, lambda name: merged(source.reader, source.delta, types[name][0])(name))
        observer(StageProgress("export", number, len(shards)))
    if len(shards) > 1:
        total = sum(place.length for place in lay_out(types).places.values())
        write_index(out, total, {name: names[files[name]] for name in sorted(files)})


def _dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    if wanted is None and stored.is_floating_point and stored.itemsize == 1:
        # rounded to 8 bits again, most of what was trained would be lost
        return torch.bfloat16
    return wanted if wanted is not None and stored.is_floating_point else stored


def _replaced(base: Path) -> Callable[[str, list[str]], set[str]]:
    """Selects what is not copied from the base: the transformer's weights, and files of the stock pipeline."""

    def ignored(where: str, names: list[str]) -> set[str]:
        if Path(where) == base:
            return {STALE}
        inside = Path(where) == base / TRANSFORMER
        return {name for name in names if inside and name.endswith((".safetensors", ".safetensors.index.json"))}

    return ignored
