"""From a name on the command line to a sampler: finds the target, chooses a backend and opens it.

An artifact is opened without torch, and without the packages that read a run's recipe: hence the imports in functions.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from fmg.core.errors import FmgError, FmgWarning, MissingDependencyError, UsageError, python_call
from fmg.core.protocols import Backend, Subject
from fmg.inference import onnxruntime as ort
from fmg.inference.artifact.backend import artifact_backend, checked_batch
from fmg.inference.artifact.layout import (
    Artifact,
    artifact_names,
    artifact_of,
    check_not_interrupted,
    is_artifact,
    open_artifact,
)
from fmg.inference.generator import DEFAULT_BATCH, Generator
from fmg.inference.hub_target import fetch_target, hub_source
from fmg.inference.tensorrt.flavours import RTX, TENSORRT, Flavour, current_gpu, lists_gpu, load_module
from fmg.inference.tensorrt.records import EngineHost, built_here, fitting_engines
from fmg.progress import log_notices, watching
from fmg.registry import backends, models
from fmg.registry.config import ComponentConfig
from fmg.version import install_line

if TYPE_CHECKING:
    from fmg.core.events import Observer
    from fmg.core.protocols import BackendSource, Model
    from fmg.inference.target import Target, TargetLike

AUTO = "auto"
TORCH = "torch"
_GIB = 1 << 30
# a run of the hub at a commit, as artifacts that were made from it name it
_PINNED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")


def find(
    target: TargetLike | Artifact, *, allow_code: bool = True, observer: Observer = log_notices
) -> Target | Artifact:
    """What `target` is: an artifact, a run, a model by name, or (None) the newest run. One of the hub is fetched first.

    Args:
        target: the target as typed or passed to a Python call.
        allow_code: whether the recipe of a run may name the user's own code. Sampling runs no reward, so code that the
            recipe names is not executed.
        observer: receives the progress of a download.

    Raises:
        UsageError: it is none of these.
        HubError: the hub cannot be reached or refuses.
        CheckpointError: a folder that is damaged.
    """
    if isinstance(target, Artifact):
        return target
    if isinstance(target, (str, PathLike)) and (place := os.fspath(target)):
        if is_artifact(place):
            return open_artifact(place)
        check_not_interrupted(place)
        if place not in models.names() and (source := hub_source(place)) is not None:
            fetched = fetch_target(source, observer)
            if fetched.kind == "artifact":
                return open_artifact(fetched.folder)
            from fmg.inference.target import pushed_target

            return pushed_target(fetched.folder, fetched.label, allow_code=allow_code)
    from fmg.inference.target import resolve_target

    return resolve_target(target, allow_code=allow_code, other=artifact_names())


def find_artifact(named: str | PathLike[str], observer: Observer = log_notices) -> Path:
    """The folder of an artifact: the given one, that in a run, or one of the hub, which is fetched first.

    Raises:
        UsageError: a run that has not been exported.
        HubError: the hub cannot be reached, refuses, or has no artifact of that name.
    """
    folder = artifact_of(named)
    source = None if folder.exists() else hub_source(os.fspath(named))
    if source is None:
        return folder
    fetched = fetch_target(source, observer)
    if fetched.kind == "run":
        raise UsageError(f"'{fetched.label}' is a run, not an artifact", "Export it first: fmg export.")
    return fetched.folder


def made_from(
    artifact: Artifact,
    *,
    allow_code: bool = True,
    advice: str = "Give the run instead of the artifact.",
    observer: Observer = log_notices,
) -> Target:
    """The run or model that an artifact was exported from, as its manifest names it.

    Args:
        artifact: what was exported.
        allow_code: as `find`.
        advice: what to do when the run is gone.
        observer: receives the progress of a download.

    Raises:
        UsageError: the run no longer exists.
    """
    from fmg.data.run_folder import is_run
    from fmg.inference.target import resolve_target, run_of_checkpoint

    adapter = artifact.manifest.adapter
    pushed = adapter is not None and _PINNED.fullmatch(adapter.run) is not None
    if adapter is not None and not pushed and not is_run(run_of_checkpoint(Path(adapter.run)) or Path(adapter.run)):
        raise UsageError(f"The run '{adapter.run}' that the artifact was made from is not here", advice)
    name = artifact.manifest.base.name if adapter is None else adapter.run
    return resolve_target(name, allow_code=allow_code, observer=observer)


@python_call
def load(
    target: TargetLike | Artifact = None,
    *,
    backend: str = AUTO,
    device: str = AUTO,
    dtype: str | None = None,
    batch_size: int | None = None,
    adapter: bool = True,
    resolution: int | None = None,
    threads: int | None = None,
    int8: bool = False,
    allow_code: bool = False,
) -> Generator:
    """The sampler of a model, a run folder, an artifact or (None) the newest run, ready to generate.

    Args:
        target: model name, run folder or artifact, or what `train` or `export_artifact` returned.
        backend: a registered backend, or `auto`: torch for models and runs, compiled on a GPU; for artifacts an engine
            that fits this machine, else ONNX Runtime.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `fp32` or `bf16`, for a model or a run; None is fp32. An artifact has the precision it was exported in.
        batch_size: images per forward pass; None takes the default.
        adapter: False loads a run's base without its adapter.
        resolution: side of the square image in pixels, for an artifact; None is its own.
        threads: CPU threads per operator; None takes the runtime's default.
        int8: run the int8 transformer of an artifact, on a CPU.
        allow_code: run the code inside version-compatible TensorRT engines.

    Raises:
        UsageError: unknown target, backend or device, or an option that the target does not have.
        MissingDependencyError: a package is not installed.
        CheckpointError: files are missing or damaged.
    """
    if isinstance(target, (str, PathLike)):
        with watching(None, None) as told:
            subject = find(target, observer=told)
    else:
        subject = find(target)
    options = _options(
        subject, dtype=dtype, adapter=adapter, resolution=resolution, threads=threads, int8=int8, allow_code=allow_code
    )
    if int8 and backend == AUTO:
        backend = ort.NAME
    source = pick_backend(subject, backend, device=device, options=options)
    if isinstance(subject, Artifact):
        sampling = subject.manifest.sampling
        size = checked_batch(subject, batch_size, DEFAULT_BATCH)
        return Generator(source.open(subject, device), sampling.grid, sampling.steps, size)
    rollout = subject.recipe.rollout
    return Generator(source.open(subject, device), rollout.grid, rollout.steps, batch_size or DEFAULT_BATCH)


def load_target(
    target: Target, *, backend: str = TORCH, device: str = AUTO, dtype: str = "fp32", batch_size: int | None = None
) -> Generator:
    """The sampler of a model or a run in torch, for evaluations: they report truncated prompts themselves.

    Raises:
        UsageError: the backend is unknown, or runs artifacts.
        MissingDependencyError: what it needs is not installed.
    """
    rollout = target.recipe.rollout
    source = pick_backend(target, backend, device=device, options={"dtype": dtype})
    return Generator(source.open(target, device), rollout.grid, rollout.steps, batch_size or DEFAULT_BATCH, tells=False)


def _options(
    subject: Target | Artifact,
    *,
    dtype: str | None,
    adapter: bool,
    resolution: int | None,
    threads: int | None,
    int8: bool,
    allow_code: bool,
) -> dict[str, object]:
    """The options for a backend of this subject; refuses those that do not apply."""
    common = {} if threads is None else {"threads": threads}
    if isinstance(subject, Artifact):
        if dtype is not None or not adapter:
            raise UsageError(
                "The precision and the adapter of an artifact are set when it is exported",
                "Leave the option out, or export again with --precision or --swap-weights.",
            )
        size = {} if resolution is None else {"resolution": resolution}
        flags = {name: True for name, given in (("int8", int8), ("allow_code", allow_code)) if given}
        return {**common, **size, **flags}
    if resolution is not None or int8 or allow_code:
        raise UsageError(
            f"'{subject.label}' is not an exported artifact; resolution, int8 and allow_code are options of artifacts",
            "Export it first: fmg export.",
        )
    return {**common, "dtype": dtype or "fp32", "adapter": adapter}


def pick_backend(
    subject: Target | Artifact, name: str = AUTO, *, device: str = AUTO, options: Mapping[str, object] | None = None
) -> BackendSource:
    """The backend called `name`, or for `auto` the preferred one that can run `subject` here.

    Args:
        subject: what images are generated from.
        name: a registered backend, or `auto`.
        device: where.
        options: options of its config; `auto` passes each backend the ones that it has.

    Raises:
        UsageError: the backend is unknown or cannot run such a subject.
        MissingDependencyError: what it needs is not installed.
    """
    options = options or {}
    if name == AUTO:
        return _preferred(subject, device, options)
    if backends.build(name).opens != _kind(subject):
        raise UsageError(*_mismatch(name, subject))
    source = backends.build(name, options)
    source.check()
    return source


def _preferred(subject: Target | Artifact, device: str, options: Mapping[str, object]) -> BackendSource:
    best: BackendSource | None = None
    for name in backends.names():
        known = backends.config_class(name).model_fields.keys()
        source = backends.build(name, {key: value for key, value in options.items() if key in known})
        better = best is None or source.preference > best.preference
        if source.opens == _kind(subject) and better and source.suits(subject, device):
            best = source
    if best is not None:
        return best
    source = backends.build(ort.NAME if isinstance(subject, Artifact) else TORCH)
    source.check()
    return source


def _kind(subject: Target | Artifact) -> str:
    return "artifact" if isinstance(subject, Artifact) else "model"


def _mismatch(name: str, subject: Target | Artifact) -> tuple[str, str]:
    fitting = ", ".join(other for other in backends.names() if backends.build(other).opens == _kind(subject))
    if isinstance(subject, Artifact):
        return f"The backend '{name}' does not run exported artifacts", f"Use one of: {fitting}."
    return (
        f"The backend '{name}' runs exported artifacts, but '{subject.label}' is not one",
        f"Export it first, or use one of: {fitting}.",
    )


class BackendConfig(ComponentConfig):
    """Options of every backend."""

    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads per operator; none: all cores")


class TorchBackendConfig(BackendConfig):
    """The model itself, eager."""

    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="weights and arithmetic of the model")
    adapter: bool = Field(default=True, description="false samples a run's base, without its adapter")


class TorchCompileConfig(TorchBackendConfig):
    """The model with its network under `torch.compile`."""

    cuda_graphs: bool = Field(default=True, description="on a GPU, replay each shape as one CUDA graph")


class ArtifactBackendConfig(BackendConfig):
    """Options of every backend that runs an artifact's graphs."""

    resolution: int | None = Field(
        default=None, ge=8, le=16384, description="side of the square image in pixels; none: the artifact's own"
    )


class OnnxRuntimeConfig(ArtifactBackendConfig):
    """ONNX Runtime: its CPU provider, or its CUDA or TensorRT provider where available."""

    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        default="auto", description="execution provider; auto takes CUDA on a GPU"
    )
    int8: bool = Field(default=False, description="run the int8 transformer of the artifact (CPU)")


class TensorRtConfig(ArtifactBackendConfig):
    """TensorRT engines of an artifact, built by `fmg export --trt`."""

    cuda_graphs: bool = Field(default=True, description="replay each shape as one CUDA graph from its third use on")
    streaming_budget_gib: float | None = Field(
        default=None, ge=0, description="weights of a weight-streaming engine to keep on the GPU; none: what fits"
    )
    allow_code: bool = Field(default=False, description="run the host code inside a version-compatible engine")

    needs_consent: ClassVar[Mapping[str, str]] = {"allow_code": "run code that comes with an engine"}


@dataclass(frozen=True)
class TorchOpener:
    """Opens models and runs in torch. The openers implement `fmg.core.protocols.BackendSource`."""

    config: TorchBackendConfig
    opens: Subject = "model"
    preference: int = 0

    def check(self) -> None:
        if find_spec("torch") is None:
            raise MissingDependencyError("The backend 'torch' needs torch", f"Run: {install_line()}")

    def suits(self, subject: Target, device: str) -> bool:
        return find_spec("torch") is not None

    def open(self, subject: Target, device: str) -> Backend:
        from fmg.inference.torch_backend import TorchBackend

        return TorchBackend(_loaded(self.config, subject, device))


@dataclass(frozen=True)
class TorchCompileOpener:
    """Opens models and runs in torch, compiled."""

    config: TorchCompileConfig
    opens: Subject = "model"
    # compiling pays off on a GPU only, and nowhere else does `auto` take it
    preference: int = 10

    def check(self) -> None:
        TorchOpener(self.config).check()

    def suits(self, subject: Target, device: str) -> bool:
        if find_spec("torch") is None or device.partition(":")[0] not in ("auto", "cuda"):
            return False
        if not subject.recipe.model.config.constant_shapes:
            return False
        import torch

        if not torch.cuda.is_available():
            return False
        from fmg.inference.compiled import check_compiler

        try:
            check_compiler(torch.device("cuda"))
        except FmgError:
            return False
        return True

    def open(self, subject: Target, device: str) -> Backend:
        self.check()
        from fmg.inference.compiled import TorchCompileBackend, check_compiler
        from fmg.inference.torch_backend import pick_device

        check_compiler(pick_device(device))
        return TorchCompileBackend(_loaded(self.config, subject, device), cuda_graphs=self.config.cuda_graphs)


def _loaded(config: TorchBackendConfig, subject: Target, device: str) -> Model:
    """The model of a target as the options of its backend state."""
    TorchOpener(config).check()
    import torch

    from fmg.inference.target import load_model

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return load_model(subject, device=device, dtype=config.dtype, adapter=config.adapter)


@dataclass(frozen=True)
class OnnxRuntimeOpener:
    """Opens artifacts in ONNX Runtime; each graph is loaded when it is first run."""

    config: OnnxRuntimeConfig
    opens: Subject = "artifact"
    preference: int = 0

    def check(self) -> None:
        ort.installed()

    def suits(self, subject: Artifact, device: str) -> bool:
        try:
            self.check()
        except FmgError:
            return False
        return True

    def open(self, subject: Artifact, device: str) -> Backend:
        transformer = ort.transformer_graph(subject, self.config.int8)
        return artifact_backend(
            subject, self._runtime(subject, device), resolution=self.config.resolution, transformer=transformer
        )

    def _runtime(self, artifact: Artifact, device: str) -> Any:
        provider, index = self._provider(device)
        if provider == ort.CPU:
            return ort.OnnxRuntime(artifact, threads=self.config.threads)
        if find_spec("torch") is None:
            raise MissingDependencyError(
                "ONNX Runtime on a GPU keeps its arrays in torch, which is not installed", f"Run: {install_line()}"
            )
        import torch

        providers = [provider, ort.CUDA] if provider == ort.TENSORRT else [provider]
        return ort.BoundOnnxRuntime(artifact, torch.device("cuda", index), providers, threads=self.config.threads)

    def _provider(self, device: str) -> tuple[str, int]:
        """The execution provider and the number of the GPU."""
        kind, _, number = device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (number and not number.isdecimal()):
            raise UsageError(f"The device '{device}' is not supported", "Use auto, cpu, cuda or cuda:N.")
        wanted, index = self.config.provider, int(number or 0)
        if wanted == "auto":
            wanted = "cuda" if kind == "cuda" or (kind == "auto" and _gpu_is_ready()) else "cpu"
        if wanted != "cpu" and kind == "cpu":
            raise UsageError(f"The provider '{wanted}' does not compute on a CPU", "Use --device cuda.")
        if wanted == "cpu" and kind == "cuda":
            raise UsageError("The provider 'cpu' does not compute on a GPU", "Use --device cpu.")
        return {"cpu": ort.CPU, "cuda": ort.CUDA, "tensorrt": ort.TENSORRT}[wanted], index


def _gpu_is_ready() -> bool:
    """Whether this onnxruntime has CUDA and torch sees a GPU."""
    if ort.CUDA not in ort.installed().get_available_providers() or find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@dataclass(frozen=True)
class TensorRtOpener:
    """Opens artifacts with their engines of one flavour of TensorRT; each engine is loaded when it is first run."""

    config: TensorRtConfig
    flavour: Flavour
    preference: int
    opens: Subject = "artifact"

    def check(self) -> None:
        load_module(self.flavour)

    def suits(self, subject: Artifact, device: str) -> bool:
        """Whether package, GPU and an engine of every graph are available, and none needs the user's consent.

        A GPU that the package does not list, an engine with code inside, or one that was not built on this computer
        (reported by a warning) has to be asked for by name.
        """
        if device.partition(":")[0] not in ("auto", "cuda") or not any(subject.engines.glob("*.json")):
            return False
        try:
            host = self._host()
            records = fitting_engines(subject, host, self.config.resolution)
        except FmgError:
            return False
        if not self.config.allow_code and any(record.carries_code for record in records.values()):
            return False
        if host.gpu is None or not lists_gpu(load_module(self.flavour), host.gpu):
            return False
        foreign = [record.plan for record in records.values() if not built_here(record.sha256)]
        if foreign:
            warnings.warn(
                f"The engine {foreign[0]} was not built on this computer and is ignored: loading a plan can run any"
                f" code. If you trust who made it, use --backend {self.flavour.backend}.",
                FmgWarning,
                stacklevel=2,
            )
        return not foreign

    def open(self, subject: Artifact, device: str) -> Backend:
        records = fitting_engines(subject, self._host(), self.config.resolution)
        from fmg.inference.tensorrt.engine import RunOptions, open_device
        from fmg.inference.tensorrt.runtime import EngineRuntime

        budget = self.config.streaming_budget_gib
        options = RunOptions(
            cuda_graphs=self.config.cuda_graphs,
            streaming_budget=None if budget is None else int(budget * _GIB),
            allow_code=self.config.allow_code,
        )
        runtime = EngineRuntime(subject, records, self.flavour, load_module(self.flavour), open_device(device), options)
        return artifact_backend(subject, runtime, resolution=self.config.resolution)

    def _host(self) -> EngineHost:
        return EngineHost(self.flavour, str(load_module(self.flavour).__version__), current_gpu())


def torch_backend(config: TorchBackendConfig) -> TorchOpener:
    """The model itself, eager."""
    return TorchOpener(config)


def torch_compile_backend(config: TorchCompileConfig) -> TorchCompileOpener:
    """The model itself, compiled."""
    return TorchCompileOpener(config)


def onnxruntime_backend(config: OnnxRuntimeConfig) -> OnnxRuntimeOpener:
    """The graphs of an artifact in ONNX Runtime."""
    return OnnxRuntimeOpener(config)


def tensorrt_backend(config: TensorRtConfig) -> TensorRtOpener:
    """TensorRT engines of an exported artifact, built on this kind of GPU."""
    return TensorRtOpener(config, TENSORRT, preference=20)


def tensorrt_rtx_backend(config: TensorRtConfig) -> TensorRtOpener:
    """TensorRT-RTX engines of an exported artifact, built ahead of time for GeForce and RTX GPUs."""
    return TensorRtOpener(config, RTX, preference=10)
