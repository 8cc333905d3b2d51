"""Engines of an artifact: which are there already, which are built, and what is written beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fmg.core.cache import cache_dir
from fmg.core.errors import CheckpointError, FmgError
from fmg.core.events import Notice, Observer, StageProgress, ignore
from fmg.core.files import atomic_file, digest, write_atomic
from fmg.export.tensorrt.check import check_network, check_refit
from fmg.export.tensorrt.graph import check_buildable
from fmg.export.tensorrt.options import AUTO, EngineOptions, pick_flavour, polygraphy_version
from fmg.export.tensorrt.process import run
from fmg.export.tensorrt.profiles import Wanted, profiles, wanted
from fmg.export.tensorrt.protocol import Job
from fmg.inference.artifact import Artifact
from fmg.inference.artifact.manifest import GRAPHS, AxisRange
from fmg.inference.tensorrt.engine import open_device
from fmg.inference.tensorrt.flavours import ANY, Flavour, Gpu, current_gpu, load_module
from fmg.inference.tensorrt.records import (
    EngineRecord,
    Ingredients,
    built_here,
    check_plan,
    engine_name,
    note_built,
    read_record,
)

DEVICE = "auto"


@dataclass(frozen=True)
class Engine:
    """An engine of the artifact, and whether it was there already."""

    record: EngineRecord
    reused: bool


@dataclass(frozen=True)
class Builder:
    """What engines are built with: the flavour, its version, and the GPU that is here."""

    flavour: Flavour
    version: str
    polygraphy: str
    gpu: Gpu | None

    @classmethod
    def pick(cls, flavour: str, options: EngineOptions) -> Builder:
        """The builder for `flavour` (`auto`, `tensorrt` or `rtx`) on this machine.

        Raises:
            UsageError: the options do not fit it.
            MissingDependencyError: a package is missing.
        """
        gpu = current_gpu()
        picked = pick_flavour(flavour, gpu)
        options.check(picked, gpu)
        return cls(picked, str(load_module(picked).__version__), polygraphy_version(picked), gpu)

    def ingredients(self, artifact: Artifact, graph: str, request: Wanted, options: EngineOptions) -> Ingredients:
        """What the engine of a graph would be built from."""
        manifest = artifact.manifest
        entry = manifest.graphs[graph]
        gpu = None if self.flavour.ahead_of_time and not options.refittable else self.gpu
        return Ingredients(
            onnx=manifest.files[entry.file].sha256,
            weights=manifest.files[entry.weights].sha256,
            profiles=profiles(graph, entry, manifest, request),
            options=options.ingredients(),
            flavour=self.flavour.name,
            version=self.version,
            gpu=ANY if gpu is None else gpu.name,
            capability=ANY if gpu is None else gpu.capability,
            driver=ANY if gpu is None else gpu.driver,
            polygraphy=self.polygraphy,
        )


def build_engines(
    artifact: Artifact,
    *,
    flavour: str = AUTO,
    resolutions: Sequence[int] | None = None,
    batch: AxisRange | None = None,
    options: EngineOptions | None = None,
    memory_gib: float | None = None,
    observer: Observer = ignore,
) -> list[Engine]:
    """Builds the engines of all graphs that have none yet for the same request.

    Everything that can be refused is refused before the first build. Engines that are finished stay when a later one
    fails; of the failed one nothing is left.

    Args:
        artifact: what was exported.
        flavour: `auto`, `tensorrt` or `rtx`.
        resolutions: sides of square images in pixels; None: those of the artifact.
        batch: rows of the engines; None: the artifact's range.
        options: options of the builder; None: the defaults.
        memory_gib: bound on the builder's host memory; None: nine tenths of what is free.
        observer: hears of phases, and of every engine that was found or made.

    Raises:
        UsageError: request, options or graphs that no engine can be built for.
        MissingDependencyError: a package is missing; the artifact stays as it is.
        FmgError: a build failed, with the builder's own reason.
    """
    chosen = options or EngineOptions()
    builder = Builder.pick(flavour, chosen)
    request = wanted(artifact.manifest, resolutions, batch)
    for graph in GRAPHS:
        entry = artifact.manifest.graphs[graph]
        check_buildable(artifact.onnx(graph), entry.weights, entry.precision)
    artifact.engines.mkdir(exist_ok=True)
    return [_engine(artifact, graph, builder, request, chosen, memory_gib, observer) for graph in GRAPHS]


def _engine(
    artifact: Artifact,
    graph: str,
    builder: Builder,
    request: Wanted,
    options: EngineOptions,
    memory_gib: float | None,
    observer: Observer,
) -> Engine:
    ingredients = builder.ingredients(artifact, graph, request, options)
    name = engine_name(graph, ingredients.key())
    if (found := _finished(artifact.engines, name, observer)) is not None:
        origin = "" if built_here(found.sha256) else ", and this computer does not remember building it"
        observer(Notice("info", f"{graph}: the engine {name} is there already{origin}"))
        return Engine(found, reused=True)
    plan = artifact.engines / f"{name}.plan"
    with atomic_file(plan) as partial:
        job = Job(
            onnx=str(artifact.onnx(graph).resolve()),
            plan=str(partial.resolve()),
            flavour=builder.flavour.name,
            profiles=ingredients.profiles,
            options=ingredients.options,
            timing_cache=_timing_cache(builder, options),
        )
        built = run(job, graph, observer, memory_gib)
        check_network(graph, built.layers, artifact.manifest.graphs[graph].precision)
        if options.refittable:
            observer(StageProgress(f"{graph}: checking biases", 0, 0))
            module, first = load_module(builder.flavour), ingredients.profiles[0].shapes
            check_refit(module, partial, artifact, graph, first, open_device(DEVICE))
        size, sha256 = partial.stat().st_size, digest(partial)
    record = EngineRecord(
        schema=1,
        key=ingredients.key(),
        graph=graph,
        plan=plan.name,
        size=size,
        sha256=sha256,
        ingredients=ingredients,
        precision=artifact.manifest.graphs[graph].precision,
        layers=built.layers,
        seconds=built.seconds,
    )
    _remember(record, observer)
    # after the plan: a plan without a record is ignored, a record without its plan would be an error
    write_atomic(plan.with_suffix(".json"), record.to_json().encode())
    observer(Notice("info", f"{graph}: built the engine {name} in {built.seconds:.1f} s"))
    return Engine(record, reused=False)


def _remember(record: EngineRecord, observer: Observer) -> None:
    try:
        note_built(record.sha256)
    except OSError as error:
        observer(
            Notice("warning", f"{cache_dir()} cannot be written ({error.strerror}): ask for this engine with --backend")
        )


def _finished(folder: Path, name: str, observer: Observer) -> EngineRecord | None:
    """The record of a complete engine of this name; one that is damaged counts as absent and is built again."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        record = read_record(path)
        check_plan(folder, record)
    except CheckpointError as error:
        observer(Notice("warning", f"{error.what}; it is built again"))
        return None
    return record


def _timing_cache(builder: Builder, options: EngineOptions) -> str | None:
    """A file of this computer for each version and GPU. TensorRT-RTX measures nothing when it builds."""
    if not options.timing_cache or builder.flavour.ahead_of_time or builder.gpu is None:
        return None
    model = re.sub(r"[^a-z0-9]+", "-", builder.gpu.name.lower()).strip("-")
    path = cache_dir() / "tensorrt" / f"timing-{builder.version}-{model}-{builder.gpu.capability}.cache"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise FmgError(f"{path} cannot be written: {error.strerror}", "Check permissions and free space.") from None
    return str(path.resolve())
