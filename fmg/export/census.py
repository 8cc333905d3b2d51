"""Which precision a graph really has: the dtypes of its weights and of the nodes that compute, counted from the file.

A graph whose products run in another precision than was asked for still draws plausible pictures, only slower or worse;
engines follow the graph (networks are strongly typed), so no builder flag would tell.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fmg.core.errors import CheckpointError
from fmg.export.onnx import require_onnx
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import Precision

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

PRODUCTS = frozenset({"Attention", "Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators whose time is spent in multiply-accumulate, and whose precision is therefore what was asked for."""
INT8_PRODUCTS = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
ACTIVATION_PRODUCTS = frozenset({"Attention", "MatMul"})
"""Products of two activations (attention) stay fp32 in a dynamically quantised graph."""

FP32_MAY = re.compile(
    r"""(^|\.)(
        pos_embed            # rotary positions
      | time_text_embed | timestep_embedder2 | time_proj   # times and their sinusoids
      | norm\w* | \w*_norm | layer_norm\w* | final_layer_norm | norm_added_\w+   # statistics of normalisation
    )(\.|$)""",
    re.VERBOSE,
)
"""Modules inside which a graph of lower precision may compute in fp32."""

_NAMES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "INT8": "int8", "UINT8": "uint8", "DOUBLE": "fp64"}
# A weight is a tensor that a product reads; scalars, biases and tables of positions are not counted as such.
_WEIGHT_RANK = 2
# Nodes that move or look at values without computing with them
_MOVES = frozenset(
    {"Cast", "Concat", "Constant", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Shape", "Slice", "Split"}
    | {"Squeeze", "Transpose", "Unsqueeze"}
)


@dataclass(frozen=True)
class Census:
    """What was counted in one graph.

    Attributes:
        weights: elements of weights (matrices and kernels) by dtype.
        products: nodes that multiply and accumulate, by dtype.
        others: other computing nodes with floating-point results, by dtype.
        foreign: the nodes whose precision is not the asked one, `module: operator (dtype)`.
    """

    weights: Mapping[str, int]
    products: Mapping[str, int]
    others: Mapping[str, int]
    foreign: tuple[str, ...]

    def values(self) -> dict[str, float]:
        """The counts by flat names."""
        named = {"weights": self.weights, "products": self.products, "others": self.others}
        return {f"{group}_{dtype}": float(n) for group, counts in named.items() for dtype, n in sorted(counts.items())}


def census(artifact: Artifact, graph: str) -> Census:
    """Counts a graph of an artifact against the precision that its manifest states.

    Raises:
        MissingDependencyError: onnx is not installed.
        CheckpointError: the file is no ONNX graph.
    """
    return census_of(artifact.onnx(graph), artifact.graph(graph).precision)


def census_of(file: Path, asked: Precision) -> Census:
    """Counts an ONNX file; the weights themselves are not read."""
    require_onnx()
    model = read_graph(file)
    dtypes = _dtypes(model)
    weights: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        kind = dtypes[tensor.name]
        may = asked in ("bf16", "fp16") and kind == "fp32" and FP32_MAY.search(tensor.name)
        if len(tensor.dims) >= _WEIGHT_RANK and kind is not None and not may:
            weights[kind] += math.prod(tensor.dims)
    products: Counter[str] = Counter()
    others: Counter[str] = Counter()
    foreign = []
    for node in model.graph.node:
        kind = _precision(node, dtypes)
        if kind is None or node.op_type in _MOVES:
            continue
        product = node.op_type in PRODUCTS | INT8_PRODUCTS
        (products if product else others)[kind] += 1
        if not _allowed(node, kind, asked, product=product):
            foreign.append(f"{module_of(node) or 'the graph itself'}: {node.op_type} ({kind})")
    # weights of another dtype that are cast before the product would hide from the count of products
    stray = {name: n for name, n in weights.items() if name != asked}
    # an 8-bit graph keeps the small layers at its borders; elsewhere only what may compute in fp32 may be stored so
    if (asked != "int8" and stray) or sum(stray.values()) > weights[asked]:
        foreign.insert(0, f"weights: {', '.join(f'{n} elements {name}' for name, n in sorted(stray.items()))}")
    if asked == "int8" and not products["int8"]:
        foreign.insert(0, "products: none is int8")
    return Census(dict(weights), dict(products), dict(others), tuple(dict.fromkeys(foreign)))


def read_graph(file: Path) -> ModelProto:
    """An ONNX model without its external weights.

    Raises:
        CheckpointError: the file is damaged or no ONNX model.
    """
    import onnx

    try:
        return onnx.load(str(file), load_external_data=False)
    except Exception as error:
        # protobuf's own DecodeError lives in another module for each of its implementations
        raise CheckpointError(
            f"{file} is no ONNX file ({type(error).__name__})", "Restore the artifact, or export it again."
        ) from None


def module_of(node: NodeProto) -> str:
    """Dotted name of the torch module that a node was traced in, without the name of the operation; may be empty."""
    scopes = scopes_of(node)
    return scopes[-1] if scopes else ""


def scopes_of(node: NodeProto) -> list[str]:
    """Dotted names of the modules around a node, outermost first, without the wrapper."""
    text = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
    # the text is a list of quoted names that the exporter wrote; the last one is the operation
    names = re.findall(r"'([^']*)'", text)[:-1]
    return [name.removeprefix("inner.") for name in names if name not in ("", "inner")]


def _allowed(node: NodeProto, kind: str, asked: Precision, *, product: bool) -> bool:
    if asked == "fp32":
        # sinusoids of positions are in double precision in diffusers, and harmless
        return kind == "fp32" or (kind == "fp64" and not product)
    if asked == "int8":
        return node.op_type in ACTIVATION_PRODUCTS or kind != "fp32" or not product
    if kind == asked:
        return True
    inside = any(FP32_MAY.search(scope) for scope in scopes_of(node))
    # what stands in no module at all are the borders of the graph: times, guidance and their scale
    return kind == "fp32" and not product and (inside or not scopes_of(node))


def _precision(node: NodeProto, dtypes: Mapping[str, str | None]) -> str | None:
    """The floating-point type that a node computes in; None for one that has none."""
    if node.op_type in INT8_PRODUCTS:
        return "int8"
    if node.op_type in PRODUCTS:
        kinds = {dtypes.get(name) for name in node.input if name} - {None}
        return str(max(kinds, key=_width)) if kinds else None
    return dtypes.get(node.output[0]) if node.output else None


def _width(kind: str | None) -> int:
    return {"fp64": 8, "fp32": 4}.get(str(kind), 2)


def _dtypes(model: ModelProto) -> dict[str, str | None]:
    """Floating-point or 8-bit type of every value that the file states one for, or that shape inference finds."""
    return {name: _NAMES.get(element) for name, element in _elements(model)}


def _elements(model: ModelProto) -> Iterator[tuple[str, str]]:
    import onnx

    graph = model.graph
    known = {value.name for value in graph.value_info}
    missing = [name for node in graph.node for name in node.output if name and name not in known]
    if len(missing) > len(graph.output):
        graph = onnx.shape_inference.infer_shapes(model).graph
    name_of = onnx.TensorProto.DataType.Name
    for value in (*graph.input, *graph.value_info, *graph.output):
        yield value.name, name_of(value.type.tensor_type.elem_type)
    for tensor in graph.initializer:
        yield tensor.name, name_of(tensor.data_type)
