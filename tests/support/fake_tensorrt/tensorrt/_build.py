"""Builder and parser. A plan is the graph with its weights inside, and what the config said."""

import os
import time
from pathlib import Path

import onnx

from ._enums import (
    BuilderFlag,
    DeviceType,
    EngineCapability,
    HardwareCompatibilityLevel,
    LayerType,
    MemoryPoolType,
    ProfilingVerbosity,
)
from ._shared import DTYPES, VERSION, ILogger, Plan, dims

LAYERS = {
    "MatMul": LayerType.MATRIX_MULTIPLY,
    "Gemm": LayerType.MATRIX_MULTIPLY,
    "Conv": LayerType.CONVOLUTION,
    "Softmax": LayerType.SOFTMAX,
    "LayerNormalization": LayerType.NORMALIZATION,
    "Cast": LayerType.CAST,
    "Transpose": LayerType.SHUFFLE,
    "Reshape": LayerType.SHUFFLE,
}


def init_libnvinfer_plugins(logger, namespace):
    return True


class IProgressMonitor:
    def __init__(self):
        pass


class ITensor:
    is_shape_tensor = False

    def __init__(self, name, shape, dtype):
        self.name, self.shape, self.dtype = name, shape, dtype


class ILayer:
    num_outputs = 1

    def __init__(self, node, dtype):
        self.name, self.type = node.name, LAYERS.get(node.op_type, LayerType.ELEMENTWISE)
        self._output = ITensor(node.output[0], (), dtype)

    def get_output(self, index):
        return self._output


class INetworkDefinition:
    def __init__(self):
        self._inputs, self._layers, self._model = [], [], b""

    @property
    def num_inputs(self):
        return len(self._inputs)

    @property
    def num_layers(self):
        return len(self._layers)

    def get_input(self, index):
        return self._inputs[index]

    def get_layer(self, index):
        return self._layers[index]

    def get_flag(self, flag):
        return True

    def __iter__(self):
        return iter(self._layers)


class ParserError:
    def __init__(self, text):
        self._text = text

    def __repr__(self):
        return self._text

    def desc(self):
        return self._text


class OnnxParser:
    flags = 0

    def __init__(self, network, logger):
        self._network, self._logger, self._errors = network, logger, []

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]

    def clear_flag(self, flag):
        pass

    def parse_from_file(self, path):
        try:
            model = onnx.load(path)
            onnx.checker.check_model(model)
        except Exception as error:
            return self._fail(f"(deserializeOnnxModel): MODEL_DESERIALIZE_FAILED: {type(error).__name__}")
        for index, node in enumerate(model.graph.node):
            if node.op_type == "Unique":
                self._logger.log(ILogger.ERROR, f"ModelImporter.cpp:140: While parsing node number {index} [Unique]:")
                where = f"In node {index} with name: {node.name} and operator: Unique"
                return self._fail(f"{where} (checkUnique): UNSUPPORTED_NODE: false")
        known = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
        known |= {value.name: value for value in model.graph.output}
        for value in model.graph.input:
            dtype = DTYPES[value.type.tensor_type.elem_type]
            self._network._inputs.append(ITensor(value.name, dims(value), dtype))
        for node in model.graph.node:
            value = known.get(node.output[0])
            if value is not None:
                self._network._layers.append(ILayer(node, DTYPES[value.type.tensor_type.elem_type]))
        self._network._model = model.SerializeToString()
        return True

    def _fail(self, text):
        self._errors.append(ParserError(text))
        return False


class IOptimizationProfile:
    def __init__(self):
        self._shapes = {}

    def set_shape(self, name, low, opt, high):
        self._shapes[name] = [list(low), list(opt), list(high)]

    def get_shape(self, name):
        return self._shapes[name]

    def __bool__(self):
        return all(
            a <= b <= c for low, opt, high in self._shapes.values() for a, b, c in zip(low, opt, high, strict=True)
        )


class ITimingCache:
    def __init__(self, data):
        self._data = bytes(data)

    def combine(self, other, ignore_mismatch):
        self._data += other._data
        return True

    def serialize(self):
        return _Memory(self._data + b"measured;")


class _Memory(bytearray):
    """Host memory, which Polygraphy uses as a context manager."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


class IBuilderConfig:
    DLA_core = -1
    default_device_type = DeviceType.GPU
    engine_capability = EngineCapability.STANDARD
    hardware_compatibility_level = HardwareCompatibilityLevel.NONE
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    builder_optimization_level = 3
    progress_monitor = None

    def __init__(self):
        self._flags, self._profiles, self._cache, self._pools = {BuilderFlag.TF32}, [], None, {}

    @property
    def num_optimization_profiles(self):
        return len(self._profiles)

    def set_flag(self, flag):
        self._flags.add(flag)

    def clear_flag(self, flag):
        self._flags.discard(flag)

    def get_flag(self, flag):
        return flag in self._flags

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def set_memory_pool_limit(self, pool, size):
        self._pools[pool] = size

    def get_memory_pool_limit(self, pool):
        return self._pools.get(pool, 1 << 36)

    def create_timing_cache(self, data):
        return ITimingCache(data)

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache

    def get_tactic_sources(self):
        return 0

    def get_preview_feature(self, feature):
        return False


class Builder:
    def __init__(self, logger):
        self._logger = logger

    def create_network(self, flags=0):
        return INetworkDefinition()

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        problem = _misfit(network, config)
        if problem:
            self._logger.log(
                ILogger.ERROR, f"IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error ({problem})"
            )
            return None
        misbehave = os.environ.get("FAKE_TENSORRT_BUILD", "")
        if misbehave == "crash":
            os.abort()
        held = bytearray(1 << 28) if misbehave == "hoard" else None
        steps = 400 if misbehave in ("hang", "hoard") else 4
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, steps)
        for step in range(steps):
            time.sleep(0.25 if steps > 4 else 0)
            if not monitor.step_complete("Building engine", step):
                return None
        monitor.phase_finish("Building engine")
        del held
        seen = os.environ.get("FAKE_TENSORRT_CONFIG")
        if seen:
            pools = {pool.name: size for pool, size in config._pools.items() if pool in MemoryPoolType}
            level, hardware = config.builder_optimization_level, config.hardware_compatibility_level.name
            Path(seen).write_text(f"{sorted(f.name for f in config._flags)} {level} {hardware} {pools}")
        flags = sorted(flag.name for flag in config._flags)
        profiles = [profile._shapes for profile in config._profiles]
        return _Memory(Plan(VERSION, profiles, flags, config.profiling_verbosity.name, network._model).pack())


def _misfit(network, config):
    for index, profile in enumerate(config._profiles):
        for tensor in network._inputs:
            for axis, size in enumerate(tensor.shape):
                given = [shape[axis] for shape in profile._shapes[tensor.name]]
                if size != -1 and set(given) != {size}:
                    return f"Dimension mismatch for tensor {tensor.name} and profile {index}. At axis {axis}"
    return ""
