"""The backends as values that can be opened; they implement `fmg.core.protocols.BackendSource`.

Importing this module imports neither torch nor pydantic, which an artifact does not need.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from fmg.core.errors import FmgError, FmgWarning, MissingDependencyError, UsageError, suggestion
from fmg.core.protocols import Backend, Subject
from fmg.inference import onnxruntime as ort
from fmg.inference.artifact.backend import artifact_backend
from fmg.inference.artifact.layout import Artifact
from fmg.inference.tensorrt.flavours import RTX, TENSORRT, Flavour, current_gpu, lists_gpu, load_module
from fmg.inference.tensorrt.records import EngineHost, built_here, fitting_engines
from fmg.version import install_line

if TYPE_CHECKING:
    from fmg.core.protocols import BackendSource, Model
    from fmg.inference.configs import OnnxRuntimeConfig, TensorRtConfig, TorchBackendConfig, TorchCompileConfig
    from fmg.inference.target import Target
    from fmg.registry import Registry

_GIB = 1 << 30


@dataclass(frozen=True)
class TorchOpener:
    """Opens models and runs in torch."""

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

    threads: int | None = None
    resolution: int | None = None
    provider: str = "auto"
    int8: bool = False
    fused: bool = True
    opens: ClassVar[Subject] = "artifact"
    preference: ClassVar[int] = 0

    def check(self) -> None:
        ort.installed()

    def suits(self, subject: Artifact, device: str) -> bool:
        try:
            self.check()
        except FmgError:
            return False
        return True

    def open(self, subject: Artifact, device: str) -> Backend:
        transformer = ort.transformer_graph(subject, self.int8)
        return artifact_backend(
            subject,
            self._runtime(subject, device),
            resolution=self.resolution,
            transformer=transformer,
            fused=self.fused,
        )

    def _runtime(self, artifact: Artifact, device: str) -> Any:
        provider, index = self._provider(device)
        if provider == ort.CPU:
            return ort.OnnxRuntime(artifact, threads=self.threads)
        if find_spec("torch") is None:
            raise MissingDependencyError(
                "ONNX Runtime on a GPU keeps its arrays in torch, which is not installed", f"Run: {install_line()}"
            )
        import torch

        providers = [provider, ort.CUDA] if provider == ort.TENSORRT else [provider]
        return ort.BoundOnnxRuntime(artifact, torch.device("cuda", index), providers, threads=self.threads)

    def _provider(self, device: str) -> tuple[str, int]:
        """The execution provider and the number of the GPU."""
        kind, _, number = device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (number and not number.isdecimal()):
            raise UsageError(f"The device '{device}' is not supported", "Use auto, cpu, cuda or cuda:N.")
        wanted, index = self.provider, int(number or 0)
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

    threads: int | None = None
    resolution: int | None = None
    cuda_graphs: bool = True
    streaming_budget_gib: float | None = None
    allow_code: bool = False
    flavour: ClassVar[Flavour] = TENSORRT
    preference: ClassVar[int] = 20
    opens: ClassVar[Subject] = "artifact"

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
            records = fitting_engines(subject, host, self.resolution)
        except FmgError:
            return False
        if not self.allow_code and any(record.carries_code for record in records.values()):
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
        records = fitting_engines(subject, self._host(), self.resolution)
        from fmg.inference.tensorrt.engine import RunOptions, open_device
        from fmg.inference.tensorrt.runtime import EngineRuntime

        budget = self.streaming_budget_gib
        options = RunOptions(
            cuda_graphs=self.cuda_graphs,
            streaming_budget=None if budget is None else int(budget * _GIB),
            allow_code=self.allow_code,
        )
        runtime = EngineRuntime(subject, records, self.flavour, load_module(self.flavour), open_device(device), options)
        # engines are built from the graphs of the loop
        return artifact_backend(subject, runtime, resolution=self.resolution, fused=False)

    def _host(self) -> EngineHost:
        return EngineHost(self.flavour, str(load_module(self.flavour).__version__), current_gpu())


@dataclass(frozen=True)
class TensorRtRtxOpener(TensorRtOpener):
    """Opens artifacts with their engines of TensorRT-RTX."""

    flavour: ClassVar[Flavour] = RTX
    preference: ClassVar[int] = 10


class ArtifactBackends:
    """The built-in backends of artifacts by name.

    They take the place of the registry, which needs pydantic, where pydantic is not installed.
    """

    _openers: ClassVar[Mapping[str, type[BackendSource]]] = {
        ort.NAME: OnnxRuntimeOpener,
        TENSORRT.backend: TensorRtOpener,
        RTX.backend: TensorRtRtxOpener,
    }

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._openers)

    def option_names(self, name: str) -> frozenset[str]:
        """The names of a backend's options. Errors as `build`."""
        return frozenset(field.name for field in fields(self._opener(name)))

    def build(self, name: str, options: Mapping[str, object] | None = None) -> BackendSource:
        """The backend with the given options.

        Raises:
            UsageError: there is no such backend or option.
        """
        opener, given = self._opener(name), dict(options or {})
        if strange := sorted(given.keys() - self.option_names(name)):
            what = f"The backend '{name}' has no option '{strange[0]}'"
            raise UsageError(what, suggestion(strange[0], self.option_names(name)))
        made: BackendSource = opener(**given)
        return made

    def _opener(self, name: str) -> Any:
        if name not in self._openers:
            what = f"There is no backend named '{name}' that runs artifacts"
            raise UsageError(what, suggestion(name, self._openers))
        return self._openers[name]


def known_backends() -> Registry[BackendSource] | ArtifactBackends:
    """The registry of backends; without pydantic, the built-in backends of artifacts."""
    if find_spec("pydantic") is None:
        return ArtifactBackends()
    from fmg.registry import backends

    return backends


def onnxruntime_backend(config: OnnxRuntimeConfig) -> OnnxRuntimeOpener:
    """The graphs of an artifact in ONNX Runtime."""
    return OnnxRuntimeOpener(**dict(config))


def tensorrt_backend(config: TensorRtConfig) -> TensorRtOpener:
    """TensorRT engines of an exported artifact, built on this kind of GPU."""
    return TensorRtOpener(**dict(config))


def tensorrt_rtx_backend(config: TensorRtConfig) -> TensorRtRtxOpener:
    """TensorRT-RTX engines of an exported artifact, built ahead of time for GeForce and RTX GPUs."""
    return TensorRtRtxOpener(**dict(config))
