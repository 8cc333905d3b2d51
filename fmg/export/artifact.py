"""Exports a run as an artifact: graphs, weights with the adapter merged, tokenizers and a manifest, all or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from fmg.core.errors import UsageError, python_call
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.files import atomic_folder, check_space
from fmg.export.calibration import CALIBRATION, calibrate
from fmg.export.fp8 import Fp8Graph, Read, fp8_modules, quantise
from fmg.export.fused import add_sampler
from fmg.export.graphs import GraphPlan
from fmg.export.int8 import add_int8
from fmg.export.loaded_source import LoadedSource
from fmg.export.onnx import OPSET, TracedGraph, require_onnx, save_graph, stored_dtype, trace
from fmg.export.options import LARGE_BATCH, SMALL_BATCH, ExportOptions, library_versions
from fmg.export.source import (
    ExportSource,
    check_exportable,
    find_source,
    packs_latents,
    recipe_facts,
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
    TRANSFORMER,
    TRANSFORMER_INT8,
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
from fmg.inference.target import TargetLike, export_folder, resolve_target
from fmg.models.common.model import AdaptedModel
from fmg.models.common.weights import TensorReader
from fmg.progress import watching
from fmg.recipe import Recipe

_PRECISIONS: Mapping[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_EIGHT_BITS = "8-bit weights"
_MEGABYTE = 10**6


class ArtifactSource(Protocol):
    """A model with what a run trained: what an artifact is written from, and verified against.

    `ExportSource` streams the files of the FLUX.1 family; `LoadedSource` has a model of any other family in memory.

    Attributes:
        schema: schema of its artifacts.
        label: the name that the user gave.
        recipe: how it is sampled and scored.
        facts: name, configs and options of the model.
        base: the weights under the adapter, none of which are kept.
        adapter: what is merged.
        reader: reads the weights of the transformer under the adapter.
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
    def reader(self) -> TensorReader: ...
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

    def graph_reader(self, graph: str, names: Sequence[str]) -> Read:
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
    return _write_artifact(source, out, options, observer)


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
                files[BASE_WEIGHTS] = write_base(folder / BASE_WEIGHTS, source.reader, changed)
            if options.precision == "fp8":
                shapes = {side: sampling.latent_shape(side) for side in sampling.resolutions}
                measured = calibrate(source.model, recipe, shapes, fp8_modules(traced), observer)
                measured.write(folder / CALIBRATION)
                made, files[CALIBRATION] = quantise(traced, measured.inputs), file_entry(folder / CALIBRATION)
        read = source.graph_reader(plan.name, list(traced.parameters))
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
