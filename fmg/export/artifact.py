"""Exports a run as an artifact: graphs, weights with the adapter merged, tokenizers and a manifest, all or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch

from fmg.core.errors import UsageError, python_call
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.files import atomic_folder, check_space
from fmg.core.model_folder import read_config, whole
from fmg.export.calibration import CALIBRATION, calibrate
from fmg.export.fp8 import Fp8Graph, Read, fp8_modules, quantise
from fmg.export.fused import add_sampler
from fmg.export.graphs import DTYPES, GraphPlan, clip_plan, decoder_plan, t5_plan, transformer_plan
from fmg.export.int8 import add_int8
from fmg.export.model_artifact import LoadedSource
from fmg.export.onnx import OPSET, TracedGraph, require_onnx, save_graph, stored_dtype, trace
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
from fmg.export.weights import lay_out, write_weights
from fmg.inference.artifact.layout import (
    BASE_WEIGHTS,
    Artifact,
    check_not_interrupted,
    file_entry,
    graph_file,
    weights_file,
    write_manifest,
)
from fmg.inference.artifact.manifest import (
    BATCH,
    HEIGHT,
    IMAGE,
    PACKED,
    PIXEL_HEIGHT,
    PIXEL_WIDTH,
    TEXT,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TRANSFORMER,
    TRANSFORMER_INT8,
    WIDTH,
    Adapter,
    AxisRange,
    Base,
    FileEntry,
    Graph,
    Manifest,
    ModelFacts,
    Precision,
    Sampling,
    TokenizerFacts,
)
from fmg.inference.target import Target, TargetLike, export_folder, load_model, resolve_target
from fmg.models.common.model import AdaptedModel
from fmg.models.common.size import latent_scale
from fmg.models.common.weights import TensorReader
from fmg.models.flux.latents import PATCH
from fmg.models.flux.loading import FLUX
from fmg.progress import watching
from fmg.recipe import Recipe

# T5 exceeds the range of fp16, so encoders stay fp32 beside an fp16 transformer
_TEXT_DTYPES: Mapping[str, torch.dtype] = {**DTYPES, "fp16": torch.float32}
_PRECISIONS: Mapping[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_EIGHT_BITS = "8-bit weights"
_MEGABYTE = 10**6


class ArtifactSource(Protocol):
    """A model with what a run trained: what an artifact is written from, and verified against.

    `PackedSource` streams the files of the FLUX.1 family; `LoadedSource` has a model of any other family in memory.

    Attributes:
        schema: schema of its artifacts.
        label: the name that the user gave.
        recipe: how it is sampled and scored.
        facts: name, configs and options of the model.
        base: the weights under the adapter, none of which are kept.
        adapter: what is merged.
        stored: the weights of the transformer under the adapter.
        summed: names of the weights that are sums of base and adapter.
        changed: names of the weights that differ from the base: these, and those that an adapter replaces.
        model: the model in memory, in fp32.
    """

    @property
    def schema(self) -> Literal[1, 2]: ...
    @property
    def label(self) -> str: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def facts(self) -> ModelFacts: ...
    @property
    def base(self) -> Base: ...
    @property
    def adapter(self) -> Adapter | None: ...
    @property
    def stored(self) -> TensorReader: ...
    @property
    def summed(self) -> frozenset[str]: ...
    @property
    def changed(self) -> frozenset[str]: ...
    @property
    def model(self) -> AdaptedModel[Any]: ...

    def sampling(self, resolutions: Sequence[int] | None) -> Sampling:
        """How the artifact is sampled.

        Args:
            resolutions: sides of square images in pixels; None: the model's own.

        Raises:
            UsageError: images of these sides cannot be generated.
        """

    def axes(self, sampling: Sampling, tokenizers: Mapping[str, TokenizerFacts]) -> Mapping[str, AxisRange]:
        """The dynamic axes besides the batch."""

    def plans(self, precision: str, tokenizers: Mapping[str, TokenizerFacts]) -> Sequence[GraphPlan]:
        """The graphs."""

    def reader(self, graph: str, names: Sequence[str]) -> Read:
        """Reads these weights of a graph."""

    def write_tokenizers(self, out: Path) -> Mapping[str, TokenizerFacts]:
        """Writes each tokenizer as one file under `out`.

        Raises:
            CheckpointError: a file is missing or damaged, or the file alone does not give the ids of the model.
        """

    def sizes(self, options: ExportOptions) -> Iterator[int]:
        """Bytes of the weight files to be written, at most."""


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
        _check_request(folder, chosen)
        return _write_artifact(LoadedSource.load(found), folder, chosen, told)


def export_source(source: ExportSource, out: Path, options: ExportOptions, *, observer: Observer = ignore) -> Artifact:
    """As `export_artifact`, for files of the FLUX.1 family that have been located."""
    _check_request(out, options)
    return _write_artifact(PackedSource(source), out, options, observer)


def _check_request(out: Path, options: ExportOptions) -> None:
    """Checks that the packages are installed, that there is no such folder yet, and that the options go together."""
    require_onnx()
    check_not_interrupted(out)
    if out.exists():
        raise UsageError(f"{out} exists already", "Export to another folder, or move that one away.")
    options.check()


def _write_artifact(source: ArtifactSource, out: Path, options: ExportOptions, observer: Observer) -> Artifact:
    sampling = source.sampling(options.resolutions)
    check_space(out, sum(source.sizes(options)))
    with atomic_folder(out) as folder:
        manifest = _write_files(source, sampling, folder, options, observer)
        if options.fused:
            manifest = add_sampler(folder, manifest)
        write_manifest(folder, manifest)
    return Artifact(out, manifest)


def _write_files(
    source: ArtifactSource, sampling: Sampling, folder: Path, options: ExportOptions, observer: Observer
) -> Manifest:
    """Writes every file but the manifest and the fused sampler; returns the manifest."""
    tokenizers, recipe, base = source.write_tokenizers(folder), source.recipe, source.base
    files = {facts.file: file_entry(folder / facts.file) for facts in tokenizers.values()}
    graphs: dict[str, Graph] = {}
    plans = source.plans(options.precision, tokenizers)
    for number, plan in enumerate(plans):
        observer(StageProgress("tracing", number, len(plans)))
        traced = trace(plan)
        made: TracedGraph | Fp8Graph = traced
        if plan.name == TRANSFORMER:
            if changed := sorted(source.changed & traced.parameters.keys()):
                base = replace(base, weights=BASE_WEIGHTS)
                files[BASE_WEIGHTS] = write_base(folder / BASE_WEIGHTS, source.stored, changed)
            if options.precision == "fp8":
                shapes = {side: sampling.latent_shape(side) for side in sampling.resolutions}
                measured = calibrate(source.model, recipe, shapes, fp8_modules(traced), observer)
                measured.write(folder / CALIBRATION)
                made, files[CALIBRATION] = quantise(traced, measured.inputs), file_entry(folder / CALIBRATION)
        read = source.reader(plan.name, list(traced.parameters))
        graphs[plan.name], written = write_graph(folder, made, read, observer)
        files |= written
    observer(StageProgress("tracing", len(plans), len(plans)))
    if options.int8:
        observer(StageProgress(_EIGHT_BITS, 0, 1))
        graphs[TRANSFORMER_INT8], written = add_int8(folder, graphs[TRANSFORMER])
        files |= written
        observer(StageProgress(_EIGHT_BITS, 1, 1))
    rewards, prompts = recipe_facts(recipe)
    usual = LARGE_BATCH if recipe.model.config.spec().gpu_memory_gb else SMALL_BATCH
    return Manifest(
        schema=source.schema,
        files=dict(sorted(files.items())),
        model=source.facts,
        sampling=sampling,
        precision=options.precision,
        opset=OPSET,
        axes={BATCH: AxisRange(*(options.batch or usual)), **source.axes(sampling, tokenizers)},
        graphs=graphs,
        tokenizers=tokenizers,
        base=base,
        adapter=source.adapter,
        rewards=rewards,
        prompts=prompts,
        libraries=library_versions(),
        checks=(),
    )


def write_graph(
    folder: Path, traced: TracedGraph | Fp8Graph, read: Read, observer: Observer
) -> tuple[Graph, dict[str, FileEntry]]:
    """Writes the ONNX file and the weight file of a graph.

    Args:
        folder: of the artifact.
        traced: the graph.
        read: reads the model's weights.
        observer: receives the progress.

    Returns:
        The manifest's entries of graph and files.
    """
    if isinstance(traced, Fp8Graph):
        precision: Precision = "fp8"
        graph, read = traced.graph, traced.reading(read)
    else:
        precision = _PRECISIONS[traced.plan.dtype]
        graph = traced
    plan, initializers = graph.plan, graph.model.graph.initializers
    dtypes = {name: stored_dtype(initializers[name]) for name in graph.parameters}
    layout = lay_out({name: (dtypes[name], shape) for name, shape in graph.parameters.items()})
    weights, file = weights_file(plan.name), graph_file(plan.name)

    def written(done: int, total: int) -> None:
        stage = f"weights of {plan.name} (MB)"
        observer(StageProgress(stage, math.ceil(done / _MEGABYTE), math.ceil(total / _MEGABYTE)))

    entry = write_weights(folder / weights, layout, lambda name: read(name, dtypes[name]), written)
    save_graph(graph, folder / file, weights, layout.places)
    files = {weights: entry, file: file_entry(folder / file)}
    return Graph(file, weights, precision, plan.inputs, plan.outputs), files


class PackedSource:
    """The files of a model of the FLUX.1 family as an `ArtifactSource`; its weights are never loaded as a whole."""

    schema: Literal[1] = PACKED

    def __init__(self, source: ExportSource) -> None:
        self._source = source
        self._vae = read_config(source.folder / "vae")
        self.label = source.label
        self.recipe = source.recipe

    @property
    def facts(self) -> ModelFacts:
        source = self._source
        return ModelFacts(source.name, plain_config(source.transformer.config), plain_config(self._vae))

    @property
    def base(self) -> Base:
        source = self._source
        options = None if source.tuned_whole else base_options(self.recipe.model.config)
        return Base(source.base, source.digest, base_dtypes(source.stored), None, options)

    @property
    def adapter(self) -> Adapter | None:
        return None if self._source.delta is None else self._source.delta.adapter

    @property
    def stored(self) -> TensorReader:
        return self._source.reader

    @property
    def summed(self) -> frozenset[str]:
        return frozenset() if self._source.delta is None else frozenset(self._source.delta.lora)

    @property
    def changed(self) -> frozenset[str]:
        return frozenset() if self._source.delta is None else self._source.delta.changed

    @property
    def model(self) -> AdaptedModel[Any]:
        source = self._source
        target = Target(source.label, source.recipe, source.checkpoint)
        return cast("AdaptedModel[Any]", load_model(target, dtype="fp32"))

    def sampling(self, resolutions: Sequence[int] | None) -> Sampling:
        conventions, rollout = self._source.conventions, self.recipe.rollout
        scale = latent_scale(self._vae)
        sizes = tuple(sorted(set(resolutions or (conventions.resolution,))))
        token = scale * PATCH
        for size in sizes:
            if size < token or size % token:
                raise UsageError(
                    f"The resolution {size} is not a multiple of {token}, the side of a token of '{self._source.name}'",
                    f"Use multiples of {token}.",
                )
        return Sampling(
            map=conventions.map,
            path=conventions.path,
            time_scale=conventions.time_scale,
            second_time=conventions.second_time.takes,
            guidance=conventions.guidance,
            latent_channels=whole(self._vae, "latent_channels"),
            latent_scale=scale,
            resolution=default_resolution(conventions.resolution, sizes),
            resolutions=sizes,
            grid=rollout.grid,
            steps=rollout.steps,
        )

    def axes(self, sampling: Sampling, tokenizers: Mapping[str, TokenizerFacts]) -> dict[str, AxisRange]:
        length = tokenizers[TEXT_ENCODER_2].length
        return {TEXT: AxisRange(length, length, length), **image_axes(sampling)}

    def plans(self, precision: str, tokenizers: Mapping[str, TokenizerFacts]) -> tuple[GraphPlan, ...]:
        folder, text = self._source.folder, _TEXT_DTYPES[precision]
        for name in ("text_encoder", "text_encoder_2"):
            FLUX.class_of(folder / name, name)
        return (
            clip_plan(read_config(folder / "text_encoder"), tokenizers[TEXT_ENCODER].length, text),
            t5_plan(read_config(folder / "text_encoder_2"), text),
            transformer_plan(self._source.transformer.config, DTYPES[precision]),
            decoder_plan(FLUX.class_of(folder / "vae", "vae"), self._vae),
        )

    def reader(self, graph: str, names: Sequence[str]) -> Read:
        return model_reader(self._source, graph, names)

    def write_tokenizers(self, out: Path) -> dict[str, TokenizerFacts]:
        return {graph: graph_tokenizer(self._source, graph, out) for graph in (TEXT_ENCODER, TEXT_ENCODER_2)}

    def sizes(self, options: ExportOptions) -> Iterator[int]:
        source = self._source
        elements = {name: math.prod(shape) for name, (_, shape) in source.stored.items()}
        total = sum(elements.values())
        yield total * DTYPES[options.precision].itemsize
        for name in ("text_encoder", "text_encoder_2"):
            yield stored_elements(source.folder / name) * _TEXT_DTYPES[options.precision].itemsize
        yield stored_elements(source.folder / "vae") * torch.float32.itemsize
        for name in self.changed:
            yield elements[name] * source.stored[name][0].itemsize
        if options.int8:
            # with the quantiser's temporary copies
            yield total * (2 * torch.float32.itemsize + 2)


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
