"""Runtime, engine, context, inspector and refitter. Each refuses what the real one refuses or leaves undefined."""

import ctypes
import json

import numpy as np
import onnx
from onnx import numpy_helper

from tests.support.fake_device import DEVICE

from ._enums import DataType, ExecutionContextAllocationStrategy, TensorIOMode
from ._shared import DTYPES, VERSION, ILogger, Plan, dims

NUMPY = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT64: np.int64, DataType.INT32: np.int32}


class MisuseError(AssertionError):
    """A call that the documentation forbids at this point."""


def _demand(condition, text):
    if not condition:
        raise MisuseError(text)


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, data):
        DEVICE.record("deserialize_cuda_engine")
        if DEVICE.broken:
            return self._refuse(f"Error Code 1: Cuda Runtime ({DEVICE.broken})")
        try:
            plan = Plan.unpack(bytes(data))
        except Exception:
            return self._refuse("Error Code 1: Serialization (Serialization assertion failed. magic tag)")
        if plan.version != VERSION and "VERSION_COMPATIBLE" not in plan.flags:
            return self._refuse(
                f"Error Code 6: API Usage Error (The engine plan file is not compatible: {plan.version})"
            )
        if "VERSION_COMPATIBLE" in plan.flags and not self.engine_host_code_allowed:
            return self._refuse("Error Code 6: API Usage Error (engine host code is not allowed)")
        return self._engine(plan, self._logger)

    def _engine(self, plan, logger):
        return ICudaEngine(plan, logger)

    def _refuse(self, reason):
        self._logger.log(ILogger.ERROR, f"IRuntime::deserializeCudaEngine: {reason}")
        return None


class ICudaEngine:
    def __init__(self, plan, logger):
        self._plan, self._logger = plan, logger
        self._model = onnx.load_from_string(plan.model)
        self._weights = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._values = [*self._model.graph.input, *self._model.graph.output]
        self._session = None
        self._contexts = 0
        self._budget = self.streamable_weights_size

    num_optimization_profiles = property(lambda self: len(self._plan.profiles))
    num_io_tensors = property(lambda self: len(self._values))
    num_layers = property(lambda self: len(self._model.graph.node))
    refittable = property(lambda self: "REFIT" in self._plan.flags)
    device_memory_size_v2 = property(lambda self: 4096)

    @property
    def streamable_weights_size(self):
        return len(self._plan.model) if "WEIGHT_STREAMING" in self._plan.flags else 0

    @property
    def weight_streaming_budget_v2(self):
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, size):
        _demand(not self._contexts, "the budget must be set before there is a context")
        _demand(0 <= size <= self.streamable_weights_size, "the budget is out of range")
        DEVICE.record("weight_streaming_budget_v2", size)
        self._budget = size

    def get_weight_streaming_automatic_budget(self):
        return self.streamable_weights_size // 2

    def get_tensor_name(self, index):
        return self._values[index].name

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in [v.name for v in self._model.graph.input] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return DTYPES[self._value(name).type.tensor_type.elem_type]

    def get_tensor_profile_shape(self, name, profile_index):
        return [tuple(shape) for shape in self._plan.profiles[profile_index][name]]

    def create_execution_context(self, strategy=ExecutionContextAllocationStrategy.STATIC):
        self._contexts += 1
        return IExecutionContext(self, strategy)

    def create_engine_inspector(self):
        return EngineInspector(self)

    def _value(self, name):
        return next(value for value in self._values if value.name == name)

    def _compute(self, feeds):
        if self._session is None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            options.log_severity_level = 3
            data = self._model.SerializeToString()
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return self._session.run(None, feeds)


class IExecutionContext:
    def __init__(self, engine, strategy):
        self._engine, self._strategy = engine, strategy
        self._profile, self._shapes, self._addresses, self._memory = None, {}, {}, None
        self._ran = False

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self._settle("set_optimization_profile_async")
        _demand(DEVICE.is_stream(stream_handle), "the profile was set on something that is no stream")
        DEVICE.record("set_optimization_profile_async", profile_index)
        self._profile, self._shapes = profile_index, {}
        return 0 <= profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name, shape):
        self._settle("set_input_shape")
        _demand(self._profile is not None, "a shape was set before a profile")
        DEVICE.record("set_input_shape", name, tuple(shape))
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
        if fits:
            self._shapes[name] = tuple(shape)
        return fits

    def infer_shapes(self):
        return [v.name for v in self._engine._model.graph.input if v.name not in self._shapes]

    def get_tensor_shape(self, name):
        if name in self._shapes:
            return self._shapes[name]
        _demand(not self.infer_shapes(), f"the shape of '{name}' was asked for before all inputs have theirs")
        axes = {}
        for value in self._engine._model.graph.input:
            for dim, size in zip(value.type.tensor_type.shape.dim, self._shapes[value.name], strict=True):
                axes[dim.dim_param] = size
        output = self._engine._value(name)
        names = [dim.dim_param for dim in output.type.tensor_type.shape.dim]
        return tuple(_axis(name, axes) if size == -1 else size for name, size in zip(names, dims(output), strict=True))

    def set_tensor_address(self, name, memory):
        self._settle("set_tensor_address")
        DEVICE.record("set_tensor_address", name)
        self._addresses[name] = memory
        return bool(memory)

    def set_device_memory(self, memory, size):
        self._settle("set_device_memory")
        _demand(size >= self._engine.device_memory_size_v2, "the device memory is too small")
        self._memory = memory

    def execute_async_v3(self, stream_handle):
        _demand(DEVICE.is_stream(stream_handle), "executed on something that is no stream")
        _demand(not self.infer_shapes(), "executed before every input has a shape")
        missing = [v.name for v in self._engine._values if v.name not in self._addresses]
        _demand(not missing, f"executed without an address for {missing}")
        managed = self._strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        _demand(self._memory is not None or not managed, "executed without device memory")
        if DEVICE.recording is not None:
            _demand(self._ran, "captured before a first execution, which allocates")
            streams = self._engine.weight_streaming_budget_v2 < self._engine.streamable_weights_size
            _demand(not streams, "captured while weights are streamed")
            DEVICE.recording.append(self._execute)
            DEVICE.record("captured")
            return True
        DEVICE.record("execute_async_v3")
        self._ran = True
        if DEVICE.failing:
            self._engine._logger.log(ILogger.ERROR, f"IExecutionContext::enqueueV3: {DEVICE.failing}")
            return False
        self._execute()
        return True

    def _execute(self):
        values = self._engine._model
        feeds = {v.name: self._view(v.name).copy() for v in values.graph.input}
        for value, result in zip(values.graph.output, self._engine._compute(feeds), strict=True):
            target = self._view(value.name)
            _demand(target.shape == result.shape, f"'{value.name}' has shape {result.shape}, not {target.shape}")
            target[...] = result

    def _view(self, name):
        dtype = np.dtype(NUMPY[self._engine.get_tensor_dtype(name)])
        shape = tuple(self.get_tensor_shape(name))
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self._addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)

    def _settle(self, call):
        _demand(DEVICE.recording is None, f"{call} while a stream is captured")
        _demand(not DEVICE.recorded(self), f"{call} on a context that a CUDA graph was captured from")


def _axis(name, axes):
    """The size of an output axis: that of the input axis of its name, or of latents for pixels."""
    if name in axes:
        return axes[name]
    for known, size in axes.items():
        if known and name == f"pixel_{known}":
            return size * DEVICE.pixels
    raise MisuseError(f"no input has the axis '{name}'")


class EngineInspector:
    def __init__(self, engine):
        self._engine = engine

    def get_engine_information(self, layer_format):
        model = self._engine._model
        if self._engine._plan.verbosity != "DETAILED":
            return json.dumps({"Layers": [node.name for node in model.graph.node], "Bindings": []})
        known = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
        known |= {value.name: value for value in self._engine._values}
        layers = []
        for node in model.graph.node:
            outputs = [known[name] for name in node.output if name in known]
            described = [{"Name": v.name, "Format/Datatype": f"Row major linear {_format(v)}"} for v in outputs]
            kind = "gemm" if node.op_type in ("MatMul", "Gemm") else node.op_type
            layers.append({"Name": node.name, "LayerType": kind, "Inputs": [], "Outputs": described})
        return json.dumps({"Layers": layers, "Bindings": [v.name for v in self._engine._values]})


def _format(value):
    names = {DataType.FLOAT: "FP32", DataType.HALF: "FP16", DataType.BF16: "BF16", DataType.BOOL: "Bool"}
    dtype = DTYPES[value.type.tensor_type.elem_type]
    return names.get(dtype, dtype.name.capitalize())


class Weights:
    def __init__(self, type=DataType.FLOAT, ptr=0, count=0):
        self.dtype, self._ptr, self.size = type, ptr, count
        self.nbytes = count * np.dtype(NUMPY[type]).itemsize


class Refitter:
    def __init__(self, engine, logger):
        self._engine, self._logger, self._set = engine, logger, {}

    def get_all_weights(self):
        return list(self._engine._weights) if self._engine.refittable else []

    def get_weights_prototype(self, name):
        if name not in self.get_all_weights():
            return Weights(count=-1)
        tensor = self._engine._weights[name]
        return Weights(DTYPES[tensor.data_type], 0, int(np.prod(tensor.dims)))

    def set_named_weights(self, name, weights):
        prototype = self.get_weights_prototype(name)
        if (prototype.size, prototype.dtype) != (weights.size, weights.dtype):
            self._logger.log(ILogger.ERROR, f"IRefitter::setNamedWeights: '{name}' has another size or type")
            return False
        self._set[name] = weights
        return True

    def get_missing_weights(self):
        return []

    def refit_cuda_engine(self):
        DEVICE.record("refit_cuda_engine", len(self._set))
        for name, weights in self._set.items():
            if name in DEVICE.dropped:
                continue
            tensor = self._engine._weights[name]
            memory = (ctypes.c_char * weights.nbytes).from_address(weights._ptr)
            values = np.frombuffer(memory, NUMPY[weights.dtype]).reshape(tuple(tensor.dims)).copy()
            tensor.CopyFrom(numpy_helper.from_array(values, name))
        self._engine._session = None
        return True
