"""A stand-in for the Python API of TensorRT 11.4, for machines without its libraries or a GPU.

It has the names of the real bindings that fmg and Polygraphy use and none that they lack (a test marked `rtx` compares
them), insists on the order of calls that the documentation demands, and computes: an engine runs its ONNX graph with
ONNX Runtime on the memory behind the addresses it was given. Its "device" is `tests.support.fake_cuda`.
"""

from ._build import (
    Builder,
    IBuilderConfig,
    INetworkDefinition,
    IOptimizationProfile,
    IProgressMonitor,
    ITimingCache,
    OnnxParser,
    ParserError,
    init_libnvinfer_plugins,
)
from ._enums import (
    BuilderFlag,
    DataType,
    DeviceType,
    EngineCapability,
    ExecutionContextAllocationStrategy,
    HardwareCompatibilityLevel,
    LayerInformationFormat,
    LayerType,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    OnnxParserFlag,
    PreviewFeature,
    ProfilingVerbosity,
    TacticSource,
    TensorIOMode,
)
from ._run import EngineInspector, ICudaEngine, IExecutionContext, Refitter, Runtime, Weights
from ._shared import VERSION, ILogger, Logger

__version__ = VERSION

__all__ = [
    "Builder",
    "BuilderFlag",
    "DataType",
    "DeviceType",
    "EngineCapability",
    "EngineInspector",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "ITimingCache",
    "LayerInformationFormat",
    "LayerType",
    "Logger",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "OnnxParserFlag",
    "ParserError",
    "PreviewFeature",
    "ProfilingVerbosity",
    "Refitter",
    "Runtime",
    "TacticSource",
    "TensorIOMode",
    "Weights",
    "init_libnvinfer_plugins",
]
