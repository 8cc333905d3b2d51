"""One engine on a GPU: deserialised once, one execution context per shape, replayed as CUDA graphs.

The calls are those of TensorRT 10 and 11 (`ICudaEngine`, `IExecutionContext`); both flavours have them.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fmg.core.errors import CheckpointError, FmgError, UsageError
from fmg.inference.cuda_device import CudaDevice, Device
from fmg.inference.tensorrt.records import Shape, ShapeRange
from fmg.inference.torch_backend import pick_device

MAX_CONTEXTS = 8
"""Number of contexts that are kept; each has the buffers of one shape."""
DTYPES: Mapping[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}
"""Dtypes by TensorRT's names."""


def open_device(name: str) -> Device:
    """The GPU called `name` (`auto`, `cuda` or `cuda:N`).

    Raises:
        UsageError: it does not exist, or is not a GPU.
    """
    device = pick_device(name)
    if device.type != "cuda":
        raise UsageError("TensorRT engines run on a GPU, but torch sees none here", "Use --backend onnxruntime.")
    return CudaDevice(torch.device("cuda", device.index or 0))


@dataclass(frozen=True)
class RunOptions:
    """How engines are run.

    Attributes:
        cuda_graphs: record the launches of each shape when it is seen a second time, and replay them as one.
        streaming_budget: bytes of the weights of a weight-streaming engine to keep on the GPU; None: TensorRT
            decides.
        allow_code: run the host code in a version-compatible engine, which is unchecked.
    """

    cuda_graphs: bool = True
    streaming_budget: int | None = None
    allow_code: bool = False


class Engine:
    """A plan on a device. Inputs and outputs are torch tensors there.

    Args:
        trt: the TensorRT module of the plan's flavour.
        plan: the file.
        device: the GPU.
        options: how to run it.
        carries_code: whether the plan was built version-compatible.

    Raises:
        UsageError: it carries code and `allow_code` is off.
        CheckpointError: TensorRT refuses it here; the message gives TensorRT's reason.
    """

    def __init__(
        self, trt: ModuleType, plan: Path, device: Device, options: RunOptions, *, carries_code: bool = False
    ) -> None:
        if carries_code and not options.allow_code:
            raise UsageError(
                f"The engine {plan.name} is version-compatible: it contains a runtime, which is unchecked code",
                "Build it here without --version-compatible, or give --allow-code if you trust who made it.",
            )
        self._trt: Any = trt
        self._plan = plan
        self._device = device
        self.log = _error_log(trt)
        self._runtime = trt.Runtime(self.log)
        if carries_code:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._deserialise()
        streams = self._set_streaming_budget(options.streaming_budget)
        # weights that are fetched while the engine runs are copies that a recording would not repeat
        self._graphs = options.cuda_graphs and not streams
        self._inputs, self._outputs = self._tensors()
        self._profiles = [self._profile(i) for i in range(self._engine.num_optimization_profiles)]
        self._workspace: Tensor | None = None
        self._contexts: OrderedDict[tuple[tuple[str, Shape], ...], _Context] = OrderedDict()

    @property
    def profiles(self) -> list[Mapping[str, ShapeRange]]:
        """Shapes of every input by profile, as stated by the engine."""
        return self._profiles

    @property
    def raw(self) -> Any:
        """TensorRT's `ICudaEngine`, for inspection and refit."""
        return self._engine

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs, as new tensors, for inputs whose shapes some profile admits; the work is queued, not awaited.

        Raises:
            UsageError: no profile admits the shapes, or an input is missing or unknown.
            FmgError: TensorRT failed, with its reason.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        context = self._context(shapes)
        with self._device.working() as stream:
            for name, tensor in inputs.items():
                context.buffers[name].copy_(tensor)
            context.launch(stream)
        return {name: context.buffers[name].clone() for name in self._outputs}

    def reset(self) -> None:
        """Forgets contexts and recordings, as after a refit, whose new weights a recording might not see."""
        self._device.synchronize()
        self._contexts.clear()

    def close(self) -> None:
        """Frees contexts and engine, in the order that TensorRT requires."""
        self.reset()
        self._workspace = None
        self._engine = self._runtime = None

    def failure(self, what: str) -> FmgError:
        """An error with TensorRT's reason."""
        return FmgError(f"The engine {self._plan.name}: {what}{self._reason()}", "Build it again: fmg export --trt.")

    def _reason(self) -> str:
        lines = self.log.take()
        return f" ({lines[0]})" if lines else ""

    def _deserialise(self) -> Any:
        with self._plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self._runtime.deserialize_cuda_engine(memoryview(plan))
        if engine is None:
            reason = self._reason() or self._diagnosis()
            raise CheckpointError(
                f"TensorRT cannot load the engine {self._plan.name} on this machine{reason}",
                "Build it on the machine that runs it (fmg export --trt), or use --backend onnxruntime or torch.",
            )
        return engine

    def _diagnosis(self) -> str:
        """What TensorRT-RTX finds wrong with the plan's header.

        Asked only about plans that did not load: on GPUs that it does not list, it reports working plans as invalid.
        """
        if not hasattr(self._runtime, "get_engine_validity"):
            return ""
        with self._plan.open("rb") as file:
            header = file.read(self._runtime.engine_header_size)
        _, flags = self._runtime.get_engine_validity(memoryview(header))
        found = [name for name, bit in self._trt.EngineInvalidityDiagnostics.__members__.items() if flags & int(bit)]
        return f" ({', '.join(name.lower().replace('_', ' ') for name in found)})" if found else self._reason()

    def _set_streaming_budget(self, budget: int | None) -> bool:
        """Whether weights are streamed. Must come before the first context, which TensorRT enforces."""
        size = int(self._engine.streamable_weights_size)
        if size == 0:
            if budget is not None:
                raise UsageError(
                    f"The engine {self._plan.name} was not built for weight streaming", "Build with --weight-streaming."
                )
            return False
        chosen = int(self._engine.get_weight_streaming_automatic_budget()) if budget is None else budget
        self._engine.weight_streaming_budget_v2 = min(chosen, size)
        return chosen < size

    def _tensors(self) -> tuple[list[str], list[str]]:
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode = self._trt.TensorIOMode.INPUT
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == mode]
        return inputs, [name for name in names if name not in inputs]

    def _profile(self, index: int) -> Mapping[str, ShapeRange]:
        return {
            name: ShapeRange(*(tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, index)))
            for name in self._inputs
        }

    def _context(self, shapes: Mapping[str, Shape]) -> _Context:
        key = tuple(sorted(shapes.items()))
        if key in self._contexts:
            self._contexts.move_to_end(key)
            return self._contexts[key]
        index = self._admitting(shapes)
        while len(self._contexts) >= MAX_CONTEXTS:
            # queued work may still use what is about to be freed
            self._device.synchronize()
            self._contexts.popitem(last=False)
        self._contexts[key] = self._new_context(index, shapes)
        return self._contexts[key]

    def _admitting(self, shapes: Mapping[str, Shape]) -> int:
        if unfit := sorted(shapes.keys() ^ set(self._inputs)):
            raise UsageError(
                f"The engine {self._plan.name} takes {', '.join(self._inputs)}; '{unfit[0]}' does not fit",
                "Build the engine for this artifact: fmg export --trt.",
            )
        for index, profile in enumerate(self._profiles):
            if all(profile[name].admits(shape) for name, shape in shapes.items()):
                return index
        # the input that fits in the fewest profiles is the one to name
        worst = min(self._inputs, key=lambda name: sum(p[name].admits(shapes[name]) for p in self._profiles))
        ranges = " or ".join(f"{p[worst].minimum} to {p[worst].maximum}" for p in self._profiles)
        raise UsageError(
            f"The engine {self._plan.name} takes '{worst}' as {ranges}, not {shapes[worst]}",
            "Build an engine for it with fmg export --trt --resolutions … --batch …, or stay within that range.",
        )

    def _new_context(self, index: int, shapes: Mapping[str, Shape]) -> _Context:
        context = self._create_context()
        if context is None:
            raise self.failure("TensorRT made no execution context")
        with self._device.working() as stream:
            if not context.set_optimization_profile_async(index, stream):
                raise self.failure(f"the profile {index} could not be set")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self.failure(f"the shape {shape} of '{name}' was refused")
        if unknown := context.infer_shapes():
            raise self.failure(f"the shape of '{unknown[0]}' stays unknown")
        buffers = {}
        for name in (*self._inputs, *self._outputs):
            shape = shapes[name] if name in shapes else tuple(context.get_tensor_shape(name))
            dtype = DTYPES[self._engine.get_tensor_dtype(name).name]
            buffers[name] = torch.empty(shape, dtype=dtype, device=self._device.torch_device)
            if not context.set_tensor_address(name, buffers[name].data_ptr()):
                raise self.failure(f"the address of '{name}' was refused")
        workspace = self._shared_workspace()
        context.set_device_memory(workspace.data_ptr(), workspace.numel())
        return _Context(self, context, buffers, workspace, self._device if self._graphs else None)

    def _create_context(self) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._engine, "create_runtime_config") or not hasattr(self._trt, "CudaGraphStrategy"):
            return self._engine.create_execution_context(strategy)
        # TensorRT-RTX compiles kernels when a shape is first run, by default in the background and with a fallback:
        # a recording would keep the fallback forever
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED
        return self._engine.create_execution_context(config)

    def _shared_workspace(self) -> Tensor:
        """Scratch memory of all contexts: they run one after the other on one stream."""
        if self._workspace is None:
            size = max(int(self._engine.device_memory_size_v2), 1)
            self._workspace = torch.empty(size, dtype=torch.uint8, device=self._device.torch_device)
        return self._workspace


class _Context:
    """One execution context with its buffers, and its recording.

    A recording contains addresses and the state of its context, so each has its own context, which is never changed.
    """

    def __init__(
        self, engine: Engine, context: Any, buffers: Mapping[str, Tensor], workspace: Tensor, recorder: Device | None
    ) -> None:
        self.buffers = buffers
        self._engine = engine
        self._context = context
        self._workspace = workspace
        self._recorder = recorder
        self._replay: Callable[[], None] | None = None
        self._warm = False

    def launch(self, stream: int) -> None:
        """Queues one execution: the first directly, which also warms up, every later one as a recording."""
        if self._recorder is None or not self._warm or not self._capturable(stream):
            self._enqueue(stream)
            self._warm = True
            return
        if self._replay is None:
            self._recorder.synchronize()
            self._replay = self._recorder.capture(self._enqueue)
        self._replay()

    def _capturable(self, stream: int) -> bool:
        asks = getattr(self._context, "is_stream_capturable", None)
        return self._replay is not None or asks is None or bool(asks(stream))

    def _enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise self._engine.failure("TensorRT failed while running it")


def _error_log(trt: Any) -> Any:
    """A logger that keeps errors, since TensorRT reports them nowhere else."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self._lines.append(" ".join(msg.split()))

        def take(self) -> list[str]:
            lines, self._lines = self._lines, []
            return lines

    return ErrorLog()
