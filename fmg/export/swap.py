"""Another adapter, or none, in an artifact that is there: new weights under the same graphs, all or nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.events import Observer, StageProgress, ignore
from fmg.export.delta import Delta, check_base, read_delta
from fmg.export.int8 import quantise
from fmg.export.merge import merged, write_base
from fmg.export.source import recipe_facts
from fmg.export.space import check_space
from fmg.export.weights import lay_out, write_weights
from fmg.inference.artifact.layout import (
    BASE_WEIGHTS,
    Artifact,
    file_entry,
    open_artifact,
    write_manifest,
)
from fmg.inference.artifact.manifest import MANIFEST, TRANSFORMER, TRANSFORMER_INT8, FileEntry, Manifest
from fmg.inference.target import Target, resolve_target
from fmg.models.common.full_files import is_full
from fmg.models.common.reader import TensorReader
from fmg.models.common.weights import tensor_names
from fmg.registry.recipe import Recipe

BASE = "base"
"""In place of a run: the weights as they were before any adapter."""

# What each dtype holds of another without loss
_EXACT: Mapping[str, frozenset[str]] = {
    "float32": frozenset({"float32", "float16", "bfloat16"}),
    "float16": frozenset({"float16"}),
    "bfloat16": frozenset({"bfloat16"}),
}


def swap_weights(folder: Path, target: str | Path | None, *, observer: Observer = ignore) -> Artifact:
    """Puts the adapter of a run into an artifact in place of what was merged before; the graphs stay.

    The weights equal those of a fresh export bit for bit. Engines stay, but belong to the old weights. Proofs that the
    manifest holds are of the old weights as well and go.

    Args:
        folder: the artifact.
        target: a run folder, `base`, or None for the newest run.
        observer: hears of the progress.

    Raises:
        UsageError: the target has no adapter, or its adapter changes weights whose stored values the artifact does
            not keep.
        CheckpointError: artifact or adapter are damaged or do not belong together; the artifact stays as it was.
    """
    artifact = open_artifact(folder)
    exported = _reader(artifact, artifact.graph(TRANSFORMER).weights)
    kept = _reader(artifact, artifact.manifest.base.weights)
    found = None if target == BASE else resolve_target(target)
    delta = None if found is None else _delta(artifact, found, exported)
    dtype = exported.describe(exported.names[0])[0]
    remembered = _remembered(artifact, delta, kept, dtype)
    base = exported.under(kept)
    layout = lay_out({name: exported.describe(name) for name in exported.names})
    check_space(folder, _needed(artifact, layout.size))
    with _replaced(folder) as partial:
        files = dict(artifact.manifest.files)
        name = artifact.graph(TRANSFORMER).weights
        (partial / name).unlink()
        files[name] = write_weights(
            partial / name,
            layout,
            merged(base, delta, dtype),
            lambda done, total: observer(StageProgress("weights of transformer (MB)", done // 10**6, total // 10**6)),
        )
        files.pop(BASE_WEIGHTS, None)
        (partial / BASE_WEIGHTS).unlink(missing_ok=True)
        if remembered:
            files[BASE_WEIGHTS] = write_base(partial / BASE_WEIGHTS, base, remembered)
        if TRANSFORMER_INT8 in artifact.manifest.graphs:
            files |= _requantised(partial, artifact)
        manifest = replace(
            artifact.manifest if found is None else _as_sampled(artifact.manifest, found.recipe),
            files=dict(sorted(files.items())),
            base=replace(artifact.manifest.base, weights=BASE_WEIGHTS if remembered else None),
            adapter=None if delta is None else delta.adapter,
            checks=(),
        )
        (partial / MANIFEST).unlink()
        write_manifest(partial, manifest)
    return Artifact(folder, manifest)


def copy_without_adapter(artifact: Artifact, folder: Path) -> Artifact:
    """A new artifact with the weights of the base: the same graphs, made of hard links where there are any.

    Raises:
        UsageError: as `swap_weights`.
    """
    _link_files(artifact.folder, folder)
    return swap_weights(folder, BASE)


def _reader(artifact: Artifact, name: str | None) -> TensorReader:
    """The tensors of one weight file; none for None."""
    if name is None:
        return TensorReader({})
    file = artifact.path(name)
    return TensorReader(dict.fromkeys(tensor_names(file), file))


def _delta(artifact: Artifact, found: Target, exported: TensorReader) -> Delta:
    if found.adapter is None:
        raise UsageError(
            f"'{found.label}' has no adapter to put into {artifact.folder}",
            f"Name a run folder, or {BASE} for the weights without an adapter.",
        )
    if is_full(found.adapter):
        raise UsageError(
            f"'{found.label}' tuned every weight, which is more than an adapter", "Export it to an artifact of its own."
        )
    shapes = {name: exported.describe(name)[1] for name in exported.names}
    delta = read_delta(found.adapter, shapes, found.label)
    check_base(delta, artifact.manifest.base.digest, str(artifact.folder))
    return delta


def _as_sampled(manifest: Manifest, recipe: Recipe) -> Manifest:
    """The manifest with the grid, the steps and the rewards of a run."""
    rewards, prompts = recipe_facts(recipe)
    sampling = replace(manifest.sampling, grid=recipe.rollout.grid, steps=recipe.rollout.steps)
    return replace(manifest, sampling=sampling, rewards=rewards, prompts=prompts)


def _remembered(artifact: Artifact, delta: Delta | None, kept: TensorReader, dtype: torch.dtype) -> frozenset[str]:
    """Which weights the artifact has to keep as its base stores them, to go back to it later."""
    changed = frozenset() if delta is None else delta.changed
    if set(artifact.manifest.base.dtypes) <= _EXACT[str(dtype).removeprefix("torch.")]:
        return changed
    if lost := sorted(changed - frozenset(kept.names)):
        raise UsageError(
            f"The adapter changes {lost[0]}, of which {artifact.folder} has only what is left in {dtype}",
            "Export the run to a new artifact instead.",
        )
    return frozenset(kept.names)


def _needed(artifact: Artifact, weights: int) -> int:
    """Bytes of the new files, at most: what does not change is linked, not copied."""
    copies = 4 if TRANSFORMER_INT8 in artifact.manifest.graphs else 2
    return copies * weights


def _requantised(folder: Path, artifact: Artifact) -> dict[str, FileEntry]:
    graph = artifact.graph(TRANSFORMER_INT8)
    for name in (graph.file, graph.weights):
        (folder / name).unlink()
    quantise(folder / artifact.graph(TRANSFORMER).file, folder / graph.file, folder / graph.weights)
    return {name: file_entry(folder / name) for name in (graph.file, graph.weights)}


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A copy of a folder made of hard links, which takes its place when the body ends without an error."""
    partial = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}.", suffix=".partial"))
    old = partial.with_suffix(".old")
    try:
        _link_files(folder, partial)
        partial.chmod(folder.stat().st_mode)
        yield partial
        folder.rename(old)
        try:
            partial.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link_files(folder: Path, copy: Path) -> None:
    for path in _files(folder):
        linked = copy / path.relative_to(folder)
        linked.parent.mkdir(parents=True, exist_ok=True)
        try:
            linked.hardlink_to(path)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, linked)


def _files(folder: Path) -> list[Path]:
    """Every file of the artifact, engines included.

    Raises:
        CheckpointError: there is a link, which would be lost or lead somewhere else.
    """
    found = sorted(folder.rglob("*"))
    if links := [path for path in found if path.is_symlink()]:
        raise CheckpointError(
            f"{links[0]} is a link, which an artifact must not have",
            "Copy the artifact with its files, not with links.",
        )
    return [path for path in found if path.is_file()]
