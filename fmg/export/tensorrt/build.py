"""Builds the engines of an artifact: options, profiles, checks, and the records beside the plans."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from fmg.core.cache import cache_dir
from fmg.core.errors import CheckpointError, FmgError, MissingDependencyError, UsageError, suggestion
from fmg.core.events import Notice, Observer, StageProgress, ignore
from fmg.core.files import atomic_file, digest, write_atomic
from fmg.export.precision_report import fp32_products, read_graph
from fmg.export.tensorrt.worker import Job, build_engine
from fmg.inference.artifact.external_data import check_external
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import (
    BATCH,
    HEIGHT,
    IMAGE,
    PACKED,
    VAE_DECODER,
    WIDTH,
    AxisRange,
    Graph,
    Manifest,
    Precision,
    TensorSpec,
)
from fmg.inference.cuda_device import Device
from fmg.inference.tensorrt.engine import Engine, RunOptions, open_device
from fmg.inference.tensorrt.flavours import (
    ANY,
    FLAVOURS,
    FP8_CAPABILITIES,
    RTX,
    TENSORRT,
    Flavour,
    Gpu,
    current_gpu,
    has_fp8,
    importable,
    load_module,
)
from fmg.inference.tensorrt.precision_report import EnginePrecision
from fmg.inference.tensorrt.records import (
    EngineRecord,
    Ingredients,
    Profile,
    Shape,
    ShapeRange,
    built_here,
    check_plan,
    engine_name,
    note_built,
    read_record,
    sizes_of,
)
from fmg.inference.tensorrt.refit import Refit

Hardware = Literal["none", "same-capability", "ampere-plus"]
AUTO = "auto"
_MAX_LEVEL = 5
_SPATIAL = frozenset({IMAGE, HEIGHT, WIDTH})
# One image of 1024 x 1024, four of 512 x 512
_DECODER_PIXELS = 1024**2
_ATTENTION_OPSET = 23
_QUANTIZED = frozenset({"MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QLinearMatMul"})
DEVICE = "auto"


@dataclass(frozen=True)
class EngineOptions:
    """Options of the builder. Precision is not one of them: an engine computes in the types of its graph.

    Attributes:
        level: effort of the search for kernels, 0 to 5.
        workspace_gib: bound on the scratch memory of one layer on the GPU, in GiB; None leaves it to the builder.
        timing_cache: keep measured kernel times beside the engines, so that the next build measures less.
        hardware: other GPUs that the engine must run on as well.
        version_compatible: build an engine that other versions of TensorRT can run. It contains its own runtime, which
            is code: running it needs the user's consent.
        weight_streaming: keep weights on the host where the GPU's memory is short.
        refittable: weights can be replaced later without a rebuild. Off by default; see `fmg.inference.tensorrt.refit`.
    """

    level: int = 3
    workspace_gib: float | None = None
    timing_cache: bool = True
    hardware: Hardware = "none"
    version_compatible: bool = False
    weight_streaming: bool = False
    refittable: bool = False

    def check(self, flavour: Flavour, gpu: Gpu | None) -> None:
        """Checks that `flavour` supports the options on this machine.

        Raises:
            UsageError: naming the first option that it does not support, and why.
        """
        self._check_values()
        if flavour == TENSORRT and gpu is None:
            raise UsageError(
                "TensorRT builds engines on a GPU, but torch sees none here",
                "Run this where the engine will run, or use --flavour rtx, which builds ahead of time without a GPU.",
            )
        if flavour != RTX:
            return
        if self.version_compatible:
            raise UsageError(
                "TensorRT-RTX has no lean runtime, which --version-compatible would pack into the engine",
                "Leave it out, or use --flavour tensorrt.",
            )
        if self.hardware != "none":
            raise UsageError(
                "TensorRT-RTX has no hardware compatibility levels: its engines run on every GPU that it supports",
                "Leave --hardware out.",
            )
        if self.refittable and gpu is None:
            raise UsageError(
                "TensorRT-RTX cannot build a refittable engine without a GPU, because its compiler queries the driver",
                "Leave --refittable out, or run this on a machine with a GPU.",
            )

    def _check_values(self) -> None:
        if not 0 <= self.level <= _MAX_LEVEL:
            raise UsageError(f"The builder level {self.level} is not from 0 to {_MAX_LEVEL}", "Use 3 if in doubt.")
        if self.workspace_gib is not None and not self.workspace_gib > 0:
            raise UsageError(f"A workspace of {self.workspace_gib} GiB is invalid", "Give a positive number.")
        if self.hardware not in get_args(Hardware):
            raise UsageError(
                f"'{self.hardware}' is not a hardware compatibility level",
                suggestion(self.hardware, get_args(Hardware)),
            )

    def ingredients(self) -> dict[str, object]:
        """The options that determine the engine, as plain JSON values. A timing cache only saves time."""
        return {name: value for name, value in asdict(self).items() if name != "timing_cache"}


def pick_flavour(name: str, gpu: Gpu | None) -> Flavour:
    """The flavour called `name`; `auto` is `tensorrt` if it can be imported and there is a GPU, else `rtx`.

    Raises:
        UsageError: for any other name.
        MissingDependencyError: the package, or Polygraphy, is not installed.
    """
    if name == AUTO:
        found = TENSORRT if gpu is not None and importable(TENSORRT) else RTX if importable(RTX) else None
        if found is None:
            raise MissingDependencyError(
                "No installed TensorRT can build an engine here; the ONNX artifact is complete without one",
                f"Get TensorRT-RTX, which builds without a GPU ({RTX.install}), or TensorRT ({TENSORRT.install}).",
            )
    elif name in FLAVOURS:
        found = FLAVOURS[name]
        load_module(found)
    else:
        raise UsageError(f"--flavour: '{name}' is not a flavour", suggestion(name, [AUTO, *FLAVOURS]))
    return found


def polygraphy_version(flavour: Flavour) -> str:
    """Version of Polygraphy, which drives the builder.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import polygraphy
    except ImportError:
        raise MissingDependencyError("Polygraphy is not installed", f"Install it: {flavour.install}") from None
    return str(polygraphy.__version__)


@dataclass(frozen=True)
class Wanted:
    """The shapes that engines must cover.

    Attributes:
        resolutions: sides of square images in pixels; each gets a profile with exactly its image tokens.
        batch: rows that the engine takes, and the number to tune for.
    """

    resolutions: tuple[int, ...]
    batch: AxisRange


def wanted(manifest: Manifest, resolutions: Sequence[int] | None, batch: AxisRange | None) -> Wanted:
    """The request, completed from the manifest and checked against it.

    Raises:
        UsageError: a resolution or batch size is outside what the artifact was exported for.
    """
    sampling = manifest.sampling
    sides = tuple(sorted(set(resolutions or sampling.resolutions)))
    step = 2 * sampling.latent_scale
    own = ", ".join(f"{side} px" for side in sampling.resolutions)
    if manifest.schema != PACKED and sides != sampling.resolutions:
        raise UsageError(
            f"--resolutions: graphs of '{manifest.model.name}' have one size, here {sampling.resolution} px",
            "Leave it out, or export an artifact for the other size.",
        )
    for side in sides:
        if side <= 0 or side % step:
            raise UsageError(
                f"--resolutions: {side} is not a multiple of {step}, the side of an image token in pixels",
                f"Use multiples of {step}; the artifact was made for {own}.",
            )
        for axis, size in sizes_of(manifest, side).items():
            _check_axis(manifest, axis, size, size, f"--resolutions: {side} px")
    chosen = batch or manifest.axes[BATCH]
    _check_axis(manifest, BATCH, chosen.minimum, chosen.maximum, "--batch")
    return Wanted(sides, chosen)


def profiles(name: str, graph: Graph, manifest: Manifest, request: Wanted) -> tuple[Profile, ...]:
    """The profiles of a graph: one for each resolution where its inputs depend on it, else one.

    The text axis has the one length that prompts are padded to: with a range, the builder would choose attention
    kernels for lengths that never occur.
    """
    spatial = any(axis in _SPATIAL for spec in graph.inputs for axis in spec.shape)
    made = []
    for side in request.resolutions if spatial else request.resolutions[:1]:
        fixed, batch = sizes_of(manifest, side), request.batch
        if name == VAE_DECODER:
            # fewer rows at high resolution, where the activations of the decoder take the most memory of all
            batch = AxisRange(1, 1, max(1, min(batch.maximum, _DECODER_PIXELS // side**2)))
        ranges = {BATCH: batch, **{axis: AxisRange(size, size, size) for axis, size in fixed.items()}}
        shapes = {spec.name: _shapes(spec.shape, ranges) for spec in graph.inputs}
        made.append(Profile(f"{side}px" if spatial else name, shapes))
    return tuple(made)


def _shapes(shape: tuple[int | str, ...], ranges: Mapping[str, AxisRange]) -> ShapeRange:
    def at(end: str) -> Shape:
        return tuple(axis if isinstance(axis, int) else getattr(ranges[axis], end) for axis in shape)

    return ShapeRange(at("minimum"), at("optimum"), at("maximum"))


def _check_axis(manifest: Manifest, axis: str, low: int, high: int, what: str) -> None:
    allowed = manifest.axes.get(axis)
    if allowed is not None and not allowed.minimum <= low <= high <= allowed.maximum:
        asked = str(low) if low == high else f"{low} to {high}"
        raise UsageError(
            f"{what} takes the axis '{axis}' to {asked}, but the artifact was exported for {allowed.minimum} to"
            f" {allowed.maximum}",
            "Stay within that range, or export the artifact again with a wider range.",
        )


def check_buildable(path: Path, weights: str, precision: Precision) -> None:
    """Refuses graphs that are known to crash the builder minutes later.

    Args:
        path: the ONNX file; its external weights are not read.
        weights: the weight file, the only one that it may point into.
        precision: precision of the arithmetic.

    Raises:
        CheckpointError: it is not an ONNX file, or it points to another file, which the parser would follow.
        UsageError: no engine can be built from it; says why.
    """
    model = read_graph(path)
    check_external(path, weights)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    operators = {node.op_type for node in model.graph.node}
    if opset >= _ATTENTION_OPSET and "Attention" in operators and precision == "fp32":
        raise UsageError(
            f"{path.name} has Attention operators of opset {opset} in fp32, for which TensorRT has no kernel",
            "Export with opset 20, where attention is plain matrix products, or in bf16.",
        )
    if quantized := sorted(operators & _QUANTIZED):
        raise UsageError(
            f"{path.name} is quantised for ONNX Runtime on a CPU ({quantized[0]}), which TensorRT cannot read",
            "Build engines of the graphs in fp32, bf16 or fp16.",
        )


def check_network(graph: str, layers: Mapping[str, Mapping[str, int]], precision: Precision, fp32: int = 0) -> None:
    """Checks that the parsed network computes in the precision of its graph; arguments as `EnginePrecision.problem`.

    Raises:
        FmgError: it does not; TensorRT is strongly typed, so neither would its engine.
    """
    if problem := EnginePrecision(layers).problem(precision, fp32):
        raise FmgError(
            f"The engine of {graph} would not compute in {precision}: {problem}",
            "Export the artifact again; the precision of an engine is that of its graph.",
        )


def check_refit(
    trt: ModuleType, plan: Path, artifact: Artifact, graph: str, profile: Mapping[str, ShapeRange], device: Device
) -> None:
    """Checks that a refittable engine depends on each of its biases.

    Raises:
        FmgError: it lost one.
    """
    engine = Engine(trt, plan, device, RunOptions(cuda_graphs=False))
    try:
        inputs = _inputs(artifact.graph(graph).inputs, profile, device)
        output = artifact.graph(graph).outputs[0].name
        Refit(trt, engine, artifact, graph).check_biases(lambda: engine.run(inputs)[output])
    finally:
        engine.close()


def _inputs(specs: tuple[TensorSpec, ...], profile: Mapping[str, ShapeRange], device: Device) -> dict[str, Tensor]:
    """The same inputs each time: token ids of 0 and 1, everything else standard normal."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for spec in specs:
        shape = profile[spec.name].minimum
        if spec.dtype == "int64":
            values = torch.randint(2, shape, generator=generator)
        else:
            values = torch.randn(shape, generator=generator)
        made[spec.name] = values.to(device.torch_device)
    return made


@dataclass(frozen=True)
class BuiltEngine:
    """An engine of the artifact, and whether it existed already."""

    record: EngineRecord
    reused: bool


@dataclass(frozen=True)
class Builder:
    """What engines are built with: the flavour, its version, and the GPU of this machine."""

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

    def check_fp8(self, options: EngineOptions) -> None:
        """Checks that engines in fp8 can be built.

        Raises:
            UsageError: a GPU that they must run on has no fp8, or an option does not go with it.
        """
        if options.refittable:
            raise UsageError(
                "The weights of an fp8 engine cannot be replaced: its scales belong to them", "Leave --refittable out."
            )
        if options.hardware == "ampere-plus":
            raise UsageError(
                "fp8 needs compute capability 8.9 (Ada), but --hardware ampere-plus asks for 8.0",
                "Leave --hardware out, or export with --precision bf16.",
            )
        if not self.flavour.ahead_of_time and self.gpu is not None and not has_fp8(self.gpu):
            raise UsageError(
                f"fp8 needs compute capability 8.9 (Ada), but {self.gpu.name} has {self.gpu.capability}",
                "Export with --precision bf16 for this GPU, or build with --flavour rtx for another.",
            )

    def _targets(self, precision: Precision) -> dict[str, object]:
        """The GPUs that an engine in fp8 is built for ahead of time: by default, some without fp8 are among them."""
        return {"capabilities": list(FP8_CAPABILITIES)} if precision == "fp8" and self.flavour.ahead_of_time else {}

    def ingredients(self, artifact: Artifact, graph: str, request: Wanted, options: EngineOptions) -> Ingredients:
        """Everything that determines the engine of a graph."""
        manifest = artifact.manifest
        entry = manifest.graphs[graph]
        gpu = None if self.flavour.ahead_of_time and not options.refittable else self.gpu
        return Ingredients(
            onnx=manifest.files[entry.file].sha256,
            weights=manifest.files[entry.weights].sha256,
            profiles=profiles(graph, entry, manifest, request),
            options=options.ingredients() | self._targets(entry.precision),
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
) -> list[BuiltEngine]:
    """Builds the engines of all graphs that have none yet for the same request.

    Everything that can be refused is refused before the first build. Finished engines stay if a later one fails;
    nothing is left of the failed one.

    Args:
        artifact: what was exported.
        flavour: `auto`, `tensorrt` or `rtx`.
        resolutions: sides of square images in pixels; None: those of the artifact.
        batch: rows of the engines; None: the artifact's range.
        options: options of the builder; None: the defaults.
        memory_gib: bound on the builder's host memory; None: nine tenths of what is free.
        observer: receives phases, and every engine that was found or built.

    Raises:
        UsageError: no engine can be built for request, options or graphs.
        MissingDependencyError: a package is missing; the artifact stays as it is.
        FmgError: a build failed, with the builder's own reason.
    """
    chosen = options or EngineOptions()
    builder = Builder.pick(flavour, chosen)
    if artifact.manifest.precision == "fp8":
        builder.check_fp8(chosen)
    request = wanted(artifact.manifest, resolutions, batch)
    graphs = artifact.manifest.required
    for graph in graphs:
        entry = artifact.manifest.graphs[graph]
        check_buildable(artifact.onnx(graph), entry.weights, entry.precision)
    artifact.engines.mkdir(exist_ok=True)
    return [_engine(artifact, graph, builder, request, chosen, memory_gib, observer) for graph in graphs]


def _engine(
    artifact: Artifact,
    graph: str,
    builder: Builder,
    request: Wanted,
    options: EngineOptions,
    memory_gib: float | None,
    observer: Observer,
) -> BuiltEngine:
    ingredients = builder.ingredients(artifact, graph, request, options)
    name = engine_name(graph, ingredients.key())
    if (found := _finished(artifact.engines, name, observer)) is not None:
        origin = "" if built_here(found.sha256) else ", but this computer has no record of building it"
        observer(Notice("info", f"{graph}: the engine {name} exists already{origin}"))
        return BuiltEngine(found, reused=True)
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
        built = build_engine(job, graph, observer, memory_gib)
        check_network(graph, built.layers, artifact.graph(graph).precision, fp32_products(artifact, graph))
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
    return BuiltEngine(record, reused=False)


def _remember(record: EngineRecord, observer: Observer) -> None:
    try:
        note_built(record.sha256)
    except OSError as error:
        observer(
            Notice("warning", f"{cache_dir()} cannot be written ({error.strerror}): select this engine with --backend")
        )


def _finished(folder: Path, name: str, observer: Observer) -> EngineRecord | None:
    """The record of a complete engine of this name; a damaged one counts as absent and is built again."""
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
    """The cache file for this version and GPU. TensorRT-RTX measures nothing when it builds."""
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
