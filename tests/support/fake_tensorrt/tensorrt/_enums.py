"""Enumerations of TensorRT 11.4, members and values as its bindings have them."""

from enum import IntEnum

BuilderFlag = IntEnum(
    "BuilderFlag",
    {
        "DEBUG": 2,
        "GPU_FALLBACK": 3,
        "REFIT": 4,
        "DISABLE_TIMING_CACHE": 5,
        "EDITABLE_TIMING_CACHE": 26,
        "TF32": 6,
        "SPARSE_WEIGHTS": 7,
        "SAFETY_SCOPE": 8,
        "DIRECT_IO": 11,
        "VERSION_COMPATIBLE": 12,
        "EXCLUDE_LEAN_RUNTIME": 13,
        "ERROR_ON_TIMING_CACHE_MISS": 15,
        "DISABLE_COMPILATION_CACHE": 17,
        "STRIP_PLAN": 18,
        "REFIT_IDENTICAL": 19,
        "WEIGHT_STREAMING": 20,
        "REFIT_INDIVIDUAL": 22,
        "STRICT_NANS": 23,
        "MONITOR_MEMORY": 24,
        "DISTRIBUTIVE_INDEPENDENCE": 27,
    },
)
DataType = IntEnum(
    "DataType",
    ["FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", "BF16", "INT64", "INT4", "FP4", "E8M0"],
    start=0,
)
DeviceType = IntEnum("DeviceType", ["GPU", "DLA"], start=0)
EngineCapability = IntEnum("EngineCapability", ["STANDARD", "SAFETY", "DLA_STANDALONE"], start=0)
ExecutionContextAllocationStrategy = IntEnum(
    "ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"], start=0
)
HardwareCompatibilityLevel = IntEnum(
    "HardwareCompatibilityLevel", ["NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"], start=0
)
LayerInformationFormat = IntEnum("LayerInformationFormat", ["ONELINE", "JSON"], start=0)
LayerType = IntEnum(
    "LayerType",
    {
        "CONVOLUTION": 0,
        "CAST": 1,
        "ACTIVATION": 2,
        "SOFTMAX": 6,
        "ELEMENTWISE": 9,
        "SHUFFLE": 13,
        "MATRIX_MULTIPLY": 17,
        "NORMALIZATION": 45,
    },
)
MemoryPoolType = IntEnum(
    "MemoryPoolType",
    ["WORKSPACE", "DLA_MANAGED_SRAM", "DLA_LOCAL_DRAM", "DLA_GLOBAL_DRAM", "TACTIC_DRAM", "TACTIC_SHARED_MEMORY"],
    start=0,
)
NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 0})
OnnxParserFlag = IntEnum("OnnxParserFlag", {"NATIVE_INSTANCENORM": 0, "ENABLE_PLUGIN_OVERRIDE": 3})
PreviewFeature = IntEnum("PreviewFeature", ["ALIASED_PLUGIN_IO_10_03", "RUNTIME_ACTIVATION_RESIZE_10_10"], start=0)
ProfilingVerbosity = IntEnum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "NONE", "DETAILED"], start=0)
TacticSource = IntEnum("TacticSource", ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"], start=0)
TensorIOMode = IntEnum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"], start=0)
