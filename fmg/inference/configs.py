"""Options of the backends, as recipes and the registry validate them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from fmg.registry.config import ComponentConfig


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
    fused: bool = Field(default=True, description="run the fused sampler of the artifact, if steps and size match")


class TensorRtConfig(ArtifactBackendConfig):
    """TensorRT engines of an artifact, built by `fmg export --trt`."""

    cuda_graphs: bool = Field(default=True, description="replay each shape as one CUDA graph from its third use on")
    streaming_budget_gib: float | None = Field(
        default=None, ge=0, description="weights of a weight-streaming engine to keep on the GPU; none: what fits"
    )
    allow_code: bool = Field(default=False, description="run the host code inside a version-compatible engine")

    needs_consent: ClassVar[Mapping[str, str]] = {"allow_code": "run code that comes with an engine"}
