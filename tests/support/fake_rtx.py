"""The additions of TensorRT-RTX to TensorRT, on top of the stand-in for TensorRT."""

from __future__ import annotations

from enum import IntEnum
from types import ModuleType
from typing import Any

from tests.support.fake_device import DEVICE

EngineValidity = IntEnum("EngineValidity", ["VALID", "SUBOPTIMAL", "INVALID"], start=0)
EngineInvalidityDiagnostics = IntEnum(
    "EngineInvalidityDiagnostics",
    {
        "VERSION_MISMATCH": 1,
        "UNSUPPORTED_CC": 2,
        "OLD_CUDA_DRIVER": 4,
        "OLD_CUDA_RUNTIME": 8,
        "INSUFFICIENT_GPU_MEMORY": 16,
        "MALFORMED_ENGINE": 32,
        "CUDA_ERROR": 64,
    },
)
ComputeCapability = IntEnum(
    "ComputeCapability",
    {"NONE": 0, "CURRENT": 1, "SM75": 75, "SM80": 80, "SM86": 86, "SM89": 89, "SM120": 120, "SM121": 121},
)
CudaGraphStrategy = IntEnum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"], start=0)
DynamicShapesKernelSpecializationStrategy = IntEnum(
    "DynamicShapesKernelSpecializationStrategy", ["LAZY", "EAGER", "NONE"], start=0
)
NAMES: dict[str, type[IntEnum]] = {
    "ComputeCapability": ComputeCapability,
    "CudaGraphStrategy": CudaGraphStrategy,
    "DynamicShapesKernelSpecializationStrategy": DynamicShapesKernelSpecializationStrategy,
    "EngineInvalidityDiagnostics": EngineInvalidityDiagnostics,
    "EngineValidity": EngineValidity,
}


class RuntimeConfig:
    """`IRuntimeConfig`: how an execution context is made."""

    cuda_graph_strategy = CudaGraphStrategy.DISABLED
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
    strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


def as_rtx(trt: ModuleType) -> ModuleType:
    """The stand-in for TensorRT with these names."""
    api: Any = trt

    class Engine(api.ICudaEngine):  # type: ignore[misc]
        def create_runtime_config(self) -> RuntimeConfig:
            return RuntimeConfig()

        def create_execution_context(self, config: RuntimeConfig) -> Any:
            specialization = config.dynamic_shapes_kernel_specialization_strategy
            DEVICE.record("runtime_config", specialization.name, config.cuda_graph_strategy.name)
            return super().create_execution_context(config.strategy)

    class Runtime(api.Runtime):  # type: ignore[misc]
        engine_header_size = 64

        def get_engine_validity(self, buffer: memoryview) -> tuple[EngineValidity, int]:
            assert len(buffer) == self.engine_header_size, "only the header is needed"
            DEVICE.record("get_engine_validity")
            return (EngineValidity.INVALID if DEVICE.invalid else EngineValidity.VALID), DEVICE.invalid

        def _engine(self, plan: Any, logger: Any) -> Any:
            return Engine(plan, logger)

        def _refuse(self, reason: str) -> None:
            if not DEVICE.invalid:
                super()._refuse(reason)

    module = ModuleType("tensorrt_rtx")
    module.__dict__.update({name: getattr(api, name) for name in api.__all__})
    module.__dict__.update(NAMES, Runtime=Runtime, ICudaEngine=Engine, __version__="1.7.1.116")
    return module
