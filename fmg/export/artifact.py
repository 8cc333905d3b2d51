"""Exports a run as an artifact: graphs, weights with the adapter merged, tokenizers and a manifest, all or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fmg.core.errors import UsageError, python_call
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.files import atomic_folder, check_space
from fmg.core.model_folder import read_config
from fmg.export.calibration import CALIBRATION, calibrated
from fmg.export.fp8 import Fp8Graph
from fmg.export.fused import add_sampler
from fmg.export.graph_files import DTYPES, write_graph
from fmg.export.graphs import GraphPlan, clip_plan, decoder_plan, t5_plan, transformer_plan
from fmg.export.int8 import add_int8
from fmg.export.onnx import OPSET, TracedGraph, require_onnx, trace
from fmg.export.options import LARGE_BATCH, SMALL_BATCH, ExportOptions, library_versions, plain_config
from fmg.export.source import (
    ExportSource,
    base_dtypes,
    base_options,
    check_exportable,
    find_source,
    graph_tokenizer,
    model_reader,
    packs_latents,
    recipe_facts,
    stored_elements,
    write_base,
)
from fmg.inference.artifact.layout import (
    BASE_WEIGHTS,
    Artifact,
    check_not_interrupted,
    file_entry,
    write_manifest,
)
from fmg.inference.artifact.manifest import (
    BATCH,
    HEIGHT,
    IMAGE,
    PIXEL_HEIGHT,
    PIXEL_WIDTH,
    TEXT,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TRANSFORMER,
    TRANSFORMER_INT8,
    WIDTH,
    AxisRange,
    Base,
    FileEntry,
    Graph,
    Manifest,
    ModelFacts,
    Sampling,
    TokenizerFacts,
)
from fmg.inference.target import Target, TargetLike, export_folder, load_model, resolve_target
from fmg.models.common.size import latent_scale
from fmg.models.flux.latents import PATCH
from fmg.models.flux.loading import FLUX
from fmg.progress import watching

# T5 exceeds the range of fp16, so encoders stay fp32 beside an fp16 transformer
_TEXT_DTYPES: Mapping[str, torch.dtype] = {**DTYPES, "fp16": torch.float32}


@python_call
def export_artifact(
    target: TargetLike = None,
    out: str | PathLike[str] | None = None,
    options: ExportOptions | None = None,
    *,
    observer: Observer | None = None,
    progress: bool | None = None,
) -> Artifact:
    """Writes the artifact of a run, with its adapter merged, or of a model as it is.

    Args:
        target: a run folder, a model by name, or None for the newest run.
        out: the folder to create; None is `artifact` in the run's folder, or `artifacts/<model>`.
        options: precision and sizes.
        observer: receives the progress.
        progress: whether progress is shown, as in `train`.

    Raises:
        UsageError: `out` exists, an option does not fit the model, or the disk is too small.
        MissingDependencyError: the ONNX packages are not installed, or published files have not been fetched.
        CheckpointError: base and adapter do not belong together, a file is damaged, a graph cannot be traced, or a
            killed swap left the artifact of that name beside `out`. Nothing is left behind.
    """
    folder = export_folder(target, "artifact") if out is None else Path(out)
    with watching(observer, progress) as told:
        found, chosen = resolve_target(target, observer=told), options or ExportOptions()
        if packs_latents(found.recipe):
            return export_source(find_source(found), folder, chosen, observer=told)
        check_exportable(found.recipe)
        _check_new(folder)
        # not needed for FLUX, whose weights are never loaded as a whole
        from fmg.export.model_artifact import export_loaded

        return export_loaded(found, folder, chosen, told)


def export_source(source: ExportSource, out: Path, options: ExportOptions, *, observer: Observer = ignore) -> Artifact:
    """As `export_artifact`, for files of the FLUX.1 family that have been located."""
    _check_new(out)
    options.check()
    export = _Export(source, options, observer)
    check_space(out, sum(export.sizes()))
    with atomic_folder(out) as partial_folder:
        manifest = export.write(partial_folder)
        if options.fused:
            manifest = add_sampler(partial_folder, manifest)
        write_manifest(partial_folder, manifest)
    return Artifact(out, manifest)


def _check_new(out: Path) -> None:
    """Checks that the packages are installed and that there is no such folder yet."""
    require_onnx()
    check_not_interrupted(out)
    if out.exists():
        raise UsageError(f"{out} exists already", "Export to another folder, or move that one away.")


class _Export:
    """An export in progress: its facts, and the entries of the files written so far."""

    def __init__(self, source: ExportSource, options: ExportOptions, observer: Observer) -> None:
        self._source = source
        self._options = options
        self._observer = observer
        self._vae = read_config(source.folder / "vae")
        self._sampling = sampling_of(source, self._vae, options.resolutions)
        self._files: dict[str, FileEntry] = {}
        self._graphs: dict[str, Graph] = {}
        self._tokenizers: dict[str, TokenizerFacts] = {}
        self._delta = source.delta

    def write(self, folder: Path) -> Manifest:
        """Writes every file but the manifest, which it returns."""
        source = self._source
        self._tokenizers = {graph: graph_tokenizer(source, graph, folder) for graph in (TEXT_ENCODER, TEXT_ENCODER_2)}
        for tokenizer in self._tokenizers.values():
            self._files[tokenizer.file] = file_entry(folder / tokenizer.file)
        plans = self._plans()
        for number, plan in enumerate(plans):
            self._observer(StageProgress("tracing", number, len(plans)))
            self._write_graph(folder, plan)
        self._observer(StageProgress("tracing", len(plans), len(plans)))
        base = None
        if self._delta is not None:
            base = BASE_WEIGHTS
            self._files[base] = write_base(folder / base, source.reader, self._delta.changed)
        if self._options.int8:
            self._observer(StageProgress("8-bit weights", 0, 1))
            self._graphs[TRANSFORMER_INT8], files = add_int8(folder, self._graphs[TRANSFORMER])
            self._files |= files
            self._observer(StageProgress("8-bit weights", 1, 1))
        options = None if source.tuned_whole else base_options(source.recipe.model.config)
        return self._manifest(Base(source.base, source.digest, base_dtypes(source.stored), base, options))

    def _plans(self) -> tuple[GraphPlan, ...]:
        source, precision = self._source, self._options.precision
        text = _TEXT_DTYPES[precision]
        for name in ("text_encoder", "text_encoder_2"):
            FLUX.class_of(source.folder / name, name)
        return (
            clip_plan(read_config(source.folder / "text_encoder"), self._tokenizers[TEXT_ENCODER].length, text),
            t5_plan(read_config(source.folder / "text_encoder_2"), text),
            transformer_plan(source.transformer.config, DTYPES[precision]),
            decoder_plan(FLUX.class_of(source.folder / "vae", "vae"), self._vae),
        )

    def _write_graph(self, folder: Path, plan: GraphPlan) -> None:
        traced = trace(plan)
        read = model_reader(self._source, plan.name, list(traced.parameters))
        narrow = plan.name == TRANSFORMER and self._options.precision == "fp8"
        made = self._in_fp8(folder, traced) if narrow else traced
        self._graphs[plan.name], files = write_graph(folder, made, read, self._observer)
        self._files |= files

    def _in_fp8(self, folder: Path, traced: TracedGraph) -> Fp8Graph:
        """The graph in fp8, calibrated; the record of the calibration is written."""
        source, sampling = self._source, self._sampling
        model: Any = load_model(Target(source.label, source.recipe, source.checkpoint), dtype="fp32")
        shapes = {side: sampling.latent_shape(side) for side in sampling.resolutions}
        made, self._files[CALIBRATION] = calibrated(folder, traced, model, source.recipe, shapes, self._observer)
        return made

    def sizes(self) -> Iterator[int]:
        """Bytes of the weight files to be written."""
        source, itemsize = self._source, DTYPES[self._options.precision].itemsize
        elements = {name: math.prod(shape) for name, (_, shape) in source.stored.items()}
        total = sum(elements.values())
        yield total * itemsize
        for name in ("text_encoder", "text_encoder_2"):
            yield stored_elements(source.folder / name) * _TEXT_DTYPES[self._options.precision].itemsize
        yield stored_elements(source.folder / "vae") * torch.float32.itemsize
        for name in self._delta.changed if self._delta is not None else ():
            yield elements[name] * source.stored[name][0].itemsize
        if self._options.int8:
            # with the quantiser's temporary copies
            yield total * (2 * torch.float32.itemsize + 2)

    def _manifest(self, base: Base) -> Manifest:
        source = self._source
        rewards, prompts = recipe_facts(source.recipe)
        return Manifest(
            schema=1,
            files=dict(sorted(self._files.items())),
            model=ModelFacts(source.name, plain_config(source.transformer.config), plain_config(self._vae)),
            sampling=self._sampling,
            precision=self._options.precision,
            opset=OPSET,
            axes=self._axes(),
            graphs=self._graphs,
            tokenizers=self._tokenizers,
            base=base,
            adapter=None if self._delta is None else self._delta.adapter,
            rewards=rewards,
            prompts=prompts,
            libraries=library_versions(),
            checks=(),
        )

    def _axes(self) -> dict[str, AxisRange]:
        length = self._tokenizers[TEXT_ENCODER_2].length
        large = bool(self._source.conventions.spec(self._source.name).gpu_memory_gb)
        return {
            BATCH: AxisRange(*(self._options.batch or (LARGE_BATCH if large else SMALL_BATCH))),
            TEXT: AxisRange(length, length, length),
            **image_axes(self._sampling),
        }


def sampling_of(source: ExportSource, vae: Mapping[str, Any], resolutions: Sequence[int] | None) -> Sampling:
    """How an artifact of `source` is sampled.

    Args:
        source: model and run.
        vae: config of its autoencoder.
        resolutions: sides of square images; None: the model's own.

    Raises:
        UsageError: a side is not a whole number of tokens.
    """
    conventions, rollout = source.conventions, source.recipe.rollout
    scale = latent_scale(vae)
    sizes = tuple(sorted(set(resolutions or (conventions.resolution,))))
    for size in sizes:
        if size < scale * PATCH or size % (scale * PATCH):
            raise UsageError(
                f"The resolution {size} is not a multiple of {scale * PATCH}, the side of a token of '{source.name}'",
                f"Use multiples of {scale * PATCH}.",
            )
    return Sampling(
        map=conventions.map,
        path=conventions.path,
        time_scale=conventions.time_scale,
        second_time=conventions.second_time.takes,
        guidance=conventions.guidance,
        latent_channels=int(vae["latent_channels"]),
        latent_scale=scale,
        resolution=default_resolution(conventions.resolution, sizes),
        resolutions=sizes,
        grid=rollout.grid,
        steps=rollout.steps,
    )


def default_resolution(own: int, sizes: Sequence[int]) -> int:
    """The default side in pixels: the model's own, or else the largest of `sizes` (in increasing order)."""
    return own if own in sizes else sizes[-1]


def image_axes(sampling: Sampling) -> dict[str, AxisRange]:
    """The axes that follow from the resolutions of an artifact, with the default resolution as optimum."""
    latent = _range(sampling, lambda size: sampling.latent_shape(size)[1])
    pixels = _range(sampling, lambda size: size)
    return {
        IMAGE: _range(sampling, sampling.image_tokens),
        HEIGHT: latent,
        WIDTH: latent,
        PIXEL_HEIGHT: pixels,
        PIXEL_WIDTH: pixels,
    }


def _range(sampling: Sampling, measure: Callable[[int], int]) -> AxisRange:
    values = [measure(size) for size in sampling.resolutions]
    return AxisRange(min(values), measure(sampling.resolution), max(values))
