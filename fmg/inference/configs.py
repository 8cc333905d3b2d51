"""Options of the backends. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from fmg.registry.config import ComponentConfig


class BackendConfig(ComponentConfig):
    """What every backend can be told."""

    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads of one operator; none: all cores")


class TorchBackendConfig(BackendConfig):
    """The model itself, eager."""

    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="weights and arithmetic of the model")
    adapter: bool = Field(default=True, description="false draws from a run's base, without its adapter")


class ArtifactBackendConfig(BackendConfig):
    """What every backend that runs an artifact's graphs can be told."""

    resolution: int | None = Field(
        default=None, ge=8, le=16384, description="side of the square image in pixels; none: the artifact's own"
    )


class OnnxRuntimeConfig(ArtifactBackendConfig):
    """ONNX Runtime: its CPU provider, or CUDA or TensorRT providers where they are."""

    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        default="auto", description="execution provider; auto takes CUDA where the device is one"
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
