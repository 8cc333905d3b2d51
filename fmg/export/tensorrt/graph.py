"""What the builder has to know of an ONNX file, read without its weights; and graphs that no engine can be made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from fmg.core.errors import CheckpointError, UsageError

_ATTENTION_OPSET = 23
_QUANTIZED = frozenset({"MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QLinearMatMul", "MatMulNBits"})

Axis = int | str


@dataclass(frozen=True)
class GraphInfo:
    """Inputs with their axes (a size, or the name of a dynamic axis), the opset, and how often each operator occurs."""

    path: Path
    opset: int
    inputs: Mapping[str, tuple[Axis, ...]]
    operators: Mapping[str, int]
    computes_in_fp32: bool


def read_graph(path: Path) -> GraphInfo:
    """Reads the graph of an ONNX file; external weights are left where they are.

    Raises:
        CheckpointError: the file is missing, damaged, or has an input without a known rank.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError:
        raise CheckpointError(f"The graph {path} is missing", "Export the artifact again.") from None
    except Exception as error:
        # protobuf's own DecodeError has another module in each of its implementations
        raise CheckpointError(f"The graph {path} is no ONNX file ({type(error).__name__})", "Export again.") from None
    weights = Counter(
        tensor.data_type for tensor in model.graph.initializer if tensor.data_type in _FLOATS and len(tensor.dims) > 1
    )
    return GraphInfo(
        path,
        max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0),
        {value.name: _axes(path, value) for value in model.graph.input},
        dict(Counter(node.op_type for node in model.graph.node)),
        bool(weights) and weights.most_common(1)[0][0] == onnx.TensorProto.FLOAT,
    )


def check_buildable(graph: GraphInfo) -> None:
    """Refuses graphs that are known to fail, which would otherwise take minutes and end in a crash of the builder.

    Raises:
        UsageError: with the reason.
    """
    if graph.opset >= _ATTENTION_OPSET and graph.computes_in_fp32 and "Attention" in graph.operators:
        raise UsageError(
            f"{graph.path.name} has fp32 Attention operators of opset {graph.opset}, for which TensorRT has no kernel",
            "Export with opset 20, where attention is plain matrix products, or in bf16.",
        )
    quantized = sorted(_QUANTIZED & graph.operators.keys())
    if quantized:
        raise UsageError(
            f"{graph.path.name} is quantized for ONNX Runtime on a CPU ({quantized[0]}), which TensorRT cannot read",
            "Build engines of the graphs in fp32, bf16 or fp16.",
        )


_FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})


def _axes(path: Path, value: onnx.ValueInfoProto) -> tuple[Axis, ...]:
    kind = value.type.tensor_type
    axes = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    if not kind.HasField("shape") or not all(axes):
        raise CheckpointError(f"{path}: the input '{value.name}' has an axis without size or name", "Export again.")
    return axes
