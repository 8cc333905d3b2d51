"""Swaps the adapter of an existing artifact: new weights under the same graphs, all or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.events import Notice, Observer, StageProgress, ignore
from fmg.core.files import OLD, check_space, leftovers, link_files, replaced_folder
from fmg.export.fused import add_sampler
from fmg.export.int8 import add_int8
from fmg.export.source import (
    Delta,
    base_options,
    check_base,
    conventions_of,
    default_resolution,
    exported_options,
    graph_options,
    image_axes,
    merged,
    read_delta,
    recipe_facts,
    write_base,
)
from fmg.export.weights import TensorType, lay_out, write_weights
from fmg.inference.artifact.layout import (
    BASE_WEIGHTS,
    Artifact,
    open_artifact,
    write_manifest,
)
from fmg.inference.artifact.manifest import (
    MANIFEST,
    PACKED,
    SAMPLER,
    TEXT_ENCODER_2,
    TRANSFORMER,
    TRANSFORMER_INT8,
    Manifest,
)
from fmg.inference.loading import base_target
from fmg.inference.target import Target, TargetLike, resolve_target
from fmg.models.common.checkpoint_files import is_full
from fmg.models.common.weights import TensorReader
from fmg.models.conventions import FlowMapConventions
from fmg.models.published import PublishedConfig
from fmg.recipe import Recipe
from fmg.registry import models

BASE = "base"
"""In place of a run: the weights without any adapter."""

_EIGHT_BITS = frozenset({"float8_e4m3fn", "float8_e5m2"})
_STORED = _EIGHT_BITS | {"float32", "float16", "bfloat16"}
# Dtypes that each dtype represents exactly
_EXACT: Mapping[str, frozenset[str]] = {
    "float32": _EIGHT_BITS | {"float32", "float16", "bfloat16"},
    "float16": _EIGHT_BITS | {"float16"},
    "bfloat16": _EIGHT_BITS | {"bfloat16"},
}


def swap_weights(folder: Path, target: TargetLike, *, observer: Observer = ignore) -> Artifact:
    """Merges the adapter of a run into an artifact in place of the previous one; the graphs stay.

    Weights and manifest equal those of a fresh export, the weights bit for bit. Engines stay, but belong to the old
    weights, as do the checks in the manifest, which are removed. The leftovers of a killed swap are repaired.

    Args:
        folder: the artifact; links are followed.
        target: a run folder, the sum of several adapters, `base`, or None for the newest run.
        observer: receives the progress.

    Raises:
        UsageError: the target has no adapter, its adapter changes weights whose stored values the artifact does not
            keep, or its model is sampled in a way that the graphs do not support.
        CheckpointError: artifact or adapter are damaged or do not belong together; the artifact stays as it was.
    """
    folder = folder.resolve()
    _recover(folder)
    artifact = open_artifact(folder)
    _check_swaps(artifact)
    if target == BASE:
        delta, recipe = None, base_target(artifact.manifest.base, observer=observer).recipe
    else:
        found = resolve_target(target, other=(BASE,), observer=observer)
        delta, recipe = _delta(artifact, found), found.recipe
        _check_graphs(artifact, found)
    here = Path.cwd()
    swapped = _swapped(artifact, delta, _as_sampled(artifact.manifest, recipe), observer)
    if here.is_relative_to(folder):
        # keeps relative paths of this process valid; a shell has to enter the new folder itself
        os.chdir(here if here.is_dir() else folder)
        observer(Notice("info", "The working directory has been replaced; enter the new one with `cd .`"))
    return swapped


def copy_without_adapter(artifact: Artifact, folder: Path) -> Artifact:
    """A new artifact with the weights of the base, to be sampled and scored like the tuned one.

    It shares the graph files through hard links if the file system supports them.

    Raises:
        UsageError: as `swap_weights`.
    """
    _check_swaps(artifact)
    _check_no_links(artifact.folder)
    link_files(artifact.folder, folder)
    return _swapped(Artifact(folder, artifact.manifest), None, artifact.manifest, ignore)


def _check_swaps(artifact: Artifact) -> None:
    """Whether the weights of an artifact can be swapped.

    Raises:
        UsageError: it does not keep the base's values of what its adapter changed.
    """
    manifest = artifact.manifest
    lost = manifest.adapter is not None and manifest.base.weights is None
    if lost or (manifest.schema != PACKED and manifest.model.options is None):
        raise UsageError(
            f"{artifact.folder} does not keep the weights under an adapter of '{manifest.model.name}'; it was perhaps"
            " exported by an earlier version of fmg",
            "Export the run, or the model, to an artifact of its own.",
        )
    if manifest.precision == "fp8":
        raise UsageError(
            f"{artifact.folder} is in fp8, which is calibrated for its present weights, so they cannot be swapped",
            "Export the run, or the model, to an artifact of its own.",
        )


def _swapped(artifact: Artifact, delta: Delta | None, manifest: Manifest, observer: Observer) -> Artifact:
    """The artifact with other weights; `manifest` gives what does not depend on them."""
    folder = artifact.folder
    exported = _exported(artifact)
    weights = artifact.manifest.base.weights
    kept = TensorReader({}) if weights is None else TensorReader.of(artifact.path(weights))
    described = {name: exported.describe(name) for name in exported.names}
    remembered = _remembered(artifact, delta, kept, described)
    base = exported.under(kept)
    layout = lay_out(described)
    # an upper bound: unchanged files are linked, not copied
    check_space(folder, (4 if TRANSFORMER_INT8 in artifact.manifest.graphs else 2) * layout.size)
    _check_no_links(folder)
    with replaced_folder(folder) as partial:
        files = dict(artifact.manifest.files)
        name = artifact.graph(TRANSFORMER).weights
        (partial / name).unlink()
        files[name] = write_weights(
            partial / name,
            layout,
            lambda name: merged(base, delta, described[name][0])(name),
            lambda done, total: observer(StageProgress("weights of transformer (MB)", done // 10**6, total // 10**6)),
        )
        files.pop(BASE_WEIGHTS, None)
        (partial / BASE_WEIGHTS).unlink(missing_ok=True)
        if remembered:
            files[BASE_WEIGHTS] = write_base(partial / BASE_WEIGHTS, base, remembered, _base_dtype(artifact.manifest))
        if TRANSFORMER_INT8 in artifact.manifest.graphs:
            described_int8, made = add_int8(partial, artifact.graph(TRANSFORMER))
            manifest = replace(manifest, graphs={**manifest.graphs, TRANSFORMER_INT8: described_int8})
            files |= made
        manifest = replace(
            manifest,
            files=dict(sorted(files.items())),
            base=replace(manifest.base, weights=BASE_WEIGHTS if remembered else None),
            adapter=None if delta is None else delta.adapter,
            checks=(),
        )
        if SAMPLER in manifest.graphs:
            # for the steps and the resolution that the manifest now states
            manifest = add_sampler(partial, manifest, check=False)
        (partial / MANIFEST).unlink()
        write_manifest(partial, manifest)
    return Artifact(folder, manifest)


def _exported(artifact: Artifact) -> TensorReader:
    return TensorReader.of(artifact.path(artifact.graph(TRANSFORMER).weights))


def _delta(artifact: Artifact, found: Target) -> Delta:
    if found.adapter is None:
        raise UsageError(
            f"'{found.label}' has no adapter to put into {artifact.folder}",
            f"Name a run folder, or {BASE} for the weights without an adapter.",
        )
    if is_full(found.adapter):
        raise UsageError(f"'{found.label}' is a full fine-tune, not an adapter", "Export it to a separate artifact.")
    exported = _exported(artifact)
    shapes = {name: exported.describe(name)[1] for name in exported.names}
    delta = read_delta(found.adapter, shapes, found.label, found.merged)
    check_base(delta, artifact.manifest.base.digest, str(artifact.folder))
    return delta


def _check_graphs(artifact: Artifact, found: Target) -> None:
    """Checks that an export of a run would write the same graphs.

    Raises:
        UsageError: the run is sampled differently.
    """
    options = artifact.manifest.model.options
    if options is None:
        facts = _packed_facts(artifact.manifest, conventions_of(found.recipe))
    else:
        config = found.recipe.model.config
        wanted, there = graph_options(config), exported_options(options, config)
        facts = {name: (wanted.get(name), there.get(name)) for name in {**there, **wanted}}
    for name, (asked, exported) in facts.items():
        if asked != exported:
            raise UsageError(
                f"'{found.label}' is sampled with {name} {asked}, but {artifact.folder} was exported for {exported}",
                "Export the run to a separate artifact.",
            )


def _packed_facts(manifest: Manifest, wanted: FlowMapConventions) -> Mapping[str, tuple[object, object]]:
    """What the graphs of FLUX fix: as a run is sampled, and as they were exported."""
    sampling, sizes = manifest.sampling, manifest.sampling.resolutions
    fits = (wanted.guidance is None) == (sampling.guidance is None)
    return {
        "map": (wanted.map, sampling.map),
        "path": (wanted.path, sampling.path),
        "time_scale": (wanted.time_scale, sampling.time_scale),
        "second_time": (wanted.second_time.plain(), manifest.model.transformer["second_time"]),
        "guidance": (wanted.guidance, wanted.guidance if fits else sampling.guidance),
        "max_sequence_length": (wanted.max_sequence_length, manifest.tokenizers[TEXT_ENCODER_2].length),
        "resolution": (wanted.resolution, wanted.resolution if wanted.resolution in sizes else list(sizes)),
    }


def _as_sampled(manifest: Manifest, recipe: Recipe) -> Manifest:
    """The manifest with everything that follows from a recipe and is not in a graph."""
    rewards, prompts = recipe_facts(recipe)
    config = recipe.model.config
    sampling, axes = replace(manifest.sampling, grid=recipe.rollout.grid, steps=recipe.rollout.steps), manifest.axes
    if manifest.schema == PACKED:
        conventions = conventions_of(recipe)
        embedded = None not in (sampling.guidance, conventions.guidance)
        sampling = replace(
            sampling,
            guidance=conventions.guidance if embedded else sampling.guidance,
            resolution=default_resolution(conventions.resolution, sampling.resolutions),
        )
        axes = {**axes, **image_axes(sampling)}
    elif isinstance(config, PublishedConfig) and "guidance" in config.sampling_options:
        sampling = replace(sampling, guidance=config.conventions().embedded_guidance(manifest.model.transformer))
    base = manifest.base
    if base.name in models.names():
        base = replace(base, options=base_options(config))
    return replace(manifest, base=base, sampling=sampling, axes=axes, rewards=rewards, prompts=prompts)


def _remembered(
    artifact: Artifact, delta: Delta | None, kept: TensorReader, described: Mapping[str, TensorType]
) -> frozenset[str]:
    """The weights that the artifact has to keep as the base stores them, to restore it later."""
    changed = frozenset() if delta is None else delta.changed
    stored = set(artifact.manifest.base.dtypes)
    if all(stored <= _EXACT[str(dtype).removeprefix("torch.")] for dtype, _ in described.values()):
        return changed
    if lost := sorted(changed - frozenset(kept.names)):
        raise UsageError(
            f"The adapter changes {lost[0]}, which {artifact.folder} stores only rounded to {described[lost[0]][0]}",
            "Export the run to a new artifact instead.",
        )
    return frozenset(kept.names)


def _base_dtype(manifest: Manifest) -> torch.dtype | None:
    """The dtype of the base's stored weights, which may be wider in the artifact; None for several dtypes."""
    dtypes = manifest.base.dtypes
    stored: torch.dtype | None = getattr(torch, dtypes[0]) if len(dtypes) == 1 and dtypes[0] in _STORED else None
    return stored


def _recover(folder: Path) -> None:
    """Restores the folder that a killed swap had moved away."""
    if not folder.exists() and (left := leftovers(folder, OLD)):
        left[-1].rename(folder)


def _check_no_links(folder: Path) -> None:
    """Whether an artifact, engines included, can be copied file by file.

    Raises:
        CheckpointError: there is a link, which would be lost or lead elsewhere.
    """
    if links := [path for path in sorted(folder.rglob("*")) if path.is_symlink()]:
        raise CheckpointError(
            f"{links[0]} is a link, which an artifact must not contain",
            "Copy the artifact with its files, not with links.",
        )
