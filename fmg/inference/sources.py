"""The backends `torch` and `onnxruntime` as the registry builds them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fmg.core.backends import Backend, Subject
from fmg.core.errors import FmgError, MissingDependencyError, UsageError
from fmg.inference import onnxruntime as ort
from fmg.inference.artifact.backend import ArtifactBackend
from fmg.inference.artifact.layout import Artifact
from fmg.inference.configs import OnnxRuntimeConfig, TorchBackendConfig
from fmg.registry import backends
from fmg.version import install_line

if TYPE_CHECKING:
    from fmg.inference.target import Target

_INSTALL_TORCH = f"Run: {install_line()}"


@dataclass(frozen=True)
class TorchSource:
    """A model in torch."""

    config: TorchBackendConfig
    opens: Subject = "model"
    preference: int = 0

    def check(self) -> None:
        """Whether torch is there.

        Raises:
            MissingDependencyError: it is not.
        """
        if find_spec("torch") is None:
            raise MissingDependencyError("The backend 'torch' needs torch", _INSTALL_TORCH)

    def suits(self, subject: Target, device: str) -> bool:
        """Whether torch is there."""
        return _passes(self)

    def open(self, subject: Target, device: str) -> Backend:
        """Loads the model with its adapter."""
        self.check()
        import torch

        from fmg.inference.backend import TorchBackend
        from fmg.inference.target import load_model

        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        model = load_model(subject, device=device, dtype=self.config.dtype, adapter=self.config.adapter)
        return TorchBackend(model)


@dataclass(frozen=True)
class OnnxRuntimeSource:
    """An artifact in ONNX Runtime."""

    config: OnnxRuntimeConfig
    opens: Subject = "artifact"
    preference: int = 0

    def check(self) -> None:
        """Whether onnxruntime is there.

        Raises:
            MissingDependencyError: it is not.
        """
        ort.installed()

    def suits(self, subject: Artifact, device: str) -> bool:
        """Whether onnxruntime is there."""
        return _passes(self)

    def open(self, subject: Artifact, device: str) -> Backend:
        """Opens the artifact; each graph is loaded when it is first run.

        Raises:
            UsageError: there is no such device or provider, or no int8 transformer.
        """
        transformer = ort.transformer_graph(subject, self.config.int8)
        runtime = self._runtime(subject, device)
        return ArtifactBackend(subject, runtime, resolution=self.config.resolution, transformer=transformer)

    def _runtime(self, artifact: Artifact, device: str) -> Any:
        provider, index = self._provider(device)
        if provider == ort.CPU:
            return ort.OnnxRuntime(artifact, threads=self.config.threads)
        if find_spec("torch") is None:
            raise MissingDependencyError(
                "ONNX Runtime on a GPU keeps its arrays in torch, which is not installed", _INSTALL_TORCH
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


@backends.register("torch", TorchBackendConfig)
def torch_source(config: TorchBackendConfig) -> TorchSource:
    """The model itself, eager."""
    return TorchSource(config)


@backends.register("onnxruntime", OnnxRuntimeConfig)
def onnxruntime_source(config: OnnxRuntimeConfig) -> OnnxRuntimeSource:
    """The graphs of an artifact in ONNX Runtime."""
    return OnnxRuntimeSource(config)


def _passes(source: TorchSource | OnnxRuntimeSource) -> bool:
    try:
        source.check()
    except FmgError:
        return False
    return True


def _gpu_is_ready() -> bool:
    """Whether this onnxruntime has CUDA and torch sees a GPU."""
    if ort.CUDA not in ort.installed().get_available_providers() or find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
