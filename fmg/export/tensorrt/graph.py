"""Graphs that no engine can be made of, refused before the builder is started."""

from __future__ import annotations

from pathlib import Path

from fmg.core.errors import UsageError
from fmg.export.census import read_graph
from fmg.inference.artifact.external_data import check_external
from fmg.inference.artifact.manifest import Precision

_ATTENTION_OPSET = 23
_QUANTIZED = frozenset({"MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QLinearMatMul"})


def check_buildable(path: Path, weights: str, precision: Precision) -> None:
    """Refuses graphs that are known to fail, which would otherwise end in a crash of the builder minutes later.

    Args:
        path: the ONNX file; its external weights are not read.
        weights: the file that they are in, the only one that it may point into.
        precision: of the arithmetic inside.

    Raises:
        CheckpointError: it is no ONNX file, or it points to another file, which the parser would follow.
        UsageError: no engine can be made of it, and why.
    """
    model = read_graph(path)
    check_external(path, weights)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    operators = {node.op_type for node in model.graph.node}
    if opset >= _ATTENTION_OPSET and "Attention" in operators and precision == "fp32":
        raise UsageError(
            f"{path.name} has Attention operators of opset {opset} in fp32, for which TensorRT has no kernel",
            "Export with opset 20, where attention is plain matrix products, or in bf16.",
        )
    if quantized := sorted(operators & _QUANTIZED):
        raise UsageError(
            f"{path.name} is quantized for ONNX Runtime on a CPU ({quantized[0]}), which TensorRT cannot read",
            "Build engines of the graphs in fp32, bf16 or fp16.",
        )
