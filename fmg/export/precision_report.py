"""The actual precision of a graph: the dtypes of its weights and of the nodes that compute, counted from the file.

A graph whose products run in a different precision than requested still generates plausible images, only slower or
worse; engines follow the graph (networks are strongly typed), so no builder flag would reveal it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fmg.core.errors import CheckpointError
from fmg.export.fp8 import in_fp8, model_name
from fmg.export.onnx import require_onnx
from fmg.export.quantization import PRODUCTS as MATRIX_PRODUCTS
from fmg.inference.artifact import io_spec
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import BATCH, Precision

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

PRODUCTS = frozenset({"Attention", "Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators dominated by multiply-accumulate, which must therefore have the requested precision."""
INT8_PRODUCTS = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
FP32_IN_INT8 = frozenset({"Attention", "Conv", "MatMul"})
"""Products that stay fp32 in a dynamically quantised graph: those of two activations (attention), and convolutions."""

_WEIGHT_MOVES = frozenset({"DequantizeLinear", "Transpose"})
BESIDE_FP8: Precision = "bf16"
"""Precision of everything in an fp8 graph but its fp8 products."""

HALF: tuple[Precision, ...] = ("bf16", "fp16")
TIMES, ROTATION, NORMALISATION, SOFTMAX, POSITIONS, LINEAR_ATTENTION = (
    "times and positions, and what is computed from them alone",
    "rotation of queries and keys",
    "statistics of normalisation",
    "softmax in the attention of the text encoders",
    "sum of image patches and their positions",
    "products of queries, keys and values in attention without a softmax",
)
STAYS_FP32: Mapping[str, str] = {
    TIMES: "bf16 rounds 0.999 to 1 and merges neighbouring positions of a large image",
    ROTATION: "a sum of two products with fp32 cosines and sines, rounded once, as in diffusers",
    NORMALISATION: "squares exceed the range of fp16, and long sums lose small terms in bf16",
    SOFTMAX: "some versions of transformers compute it in fp32",
    POSITIONS: "a sum with fp32 sinusoids, rounded once, as in diffusers",
    LINEAR_ATTENTION: "sums over all tokens exceed the range of fp16; diffusers computes it in fp32",
}
"""Everything that a half-precision graph computes in fp32, and why; docs/export.md has the same list.

Inputs and outputs of a graph are fp32 as well, and the decoder is entirely fp32. A table that is stored in fp32 belongs
to the nodes that read it. Moving a value is not computing.
"""

_PLACES: Mapping[str, tuple[re.Pattern[str], frozenset[str]]] = {
    # times reach their sinusoids packed with the pooled prompt (fmg.models.flux.transformer), so as data
    TIMES: (re.compile(r"(^|\.)time_proj$"), frozenset({"Mul", "Sin", "Cos"})),
    NORMALISATION: (
        re.compile(
            r"""(^|\.)(
                norm_(added_)?[qk]                 # of queries and keys
              | norm(1|1_context|_out)?\.norm      # inside an adaptive one, whose scale and shift are not fp32
              | norm2(_context)? | caption_norm
              | layer_norm[12]? | final_layer_norm # of the text encoders
            )$""",
            re.VERBOSE,
        ),
        frozenset({"Pow", "ReduceMean", "Add", "Sub", "Sqrt", "Reciprocal", "Mul", "Div"})
        | {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"},
    ),
    SOFTMAX: (re.compile(r"(^|\.)(SelfAttention|self_attn)$"), frozenset({"Softmax"})),
    POSITIONS: (re.compile(r"(^|\.)pos_embed$"), frozenset({"Add"})),
}
"""Modules by their dotted names, and what may be fp32 in them; other entries are recognised by the source of values."""
_ATTENTION = re.compile(r"(^|\.)attn$")
_LINEAR = re.compile(r"(^|\.)attn1$"), frozenset({"Add", "Div", "MatMul", "Pad"})

# Inputs from which times and positions are computed; whatever depends on another input or a weight is data
_IDS = frozenset({io_spec.IMG_IDS, io_spec.TXT_IDS})
_PLAIN_INPUTS = _IDS | {io_spec.TIMESTEP, io_spec.SECOND, io_spec.GUIDANCE}
_DATA = "data"
# tables of positions, where they have one size and are stored
_TABLE = "table"
_SIZES = frozenset({"Shape", "Size"})

_NAMES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "INT8": "int8", "UINT8": "uint8", "DOUBLE": "fp64"}
_NAMES |= {"FLOAT8E4M3FN": "fp8"}
# Scalars and biases are not counted as weights.
_WEIGHT_RANK = 2
# Nodes that move, round or inspect values without computing with them
_MOVES = frozenset(
    {"Cast", "Concat", "Constant", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Shape", "Slice", "Split"}
    | {"DequantizeLinear", "QuantizeLinear", "Squeeze", "Transpose", "Unsqueeze"}
)


@dataclass(frozen=True)
class PrecisionReport:
    """The counts of one graph.

    Attributes:
        weights: elements of weights (matrices and kernels) by dtype.
        products: nodes that multiply and accumulate, by dtype.
        others: other computing nodes with floating-point results, by dtype.
        foreign: the nodes that do not have the requested precision, `module: operator (dtype)`.
        operations: multiply-accumulates of one image in products, by dtype; counted for fp8 only.
    """

    weights: Mapping[str, int]
    products: Mapping[str, int]
    others: Mapping[str, int]
    foreign: tuple[str, ...]
    operations: Mapping[str, int] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """The counts by flat names, and the share of all operations by dtype."""
        named = {"weights": self.weights, "products": self.products, "others": self.others}
        counted = {f"{group}_{kind}": float(n) for group, counts in named.items() for kind, n in sorted(counts.items())}
        total = sum(self.operations.values())
        return counted | {f"operations_{kind}": n / total for kind, n in sorted(self.operations.items())}


def precision_of(artifact: Artifact, graph: str) -> PrecisionReport:
    """Counts a graph of an artifact and compares it with the precision in its manifest.

    Raises:
        MissingDependencyError: onnx is not installed.
        CheckpointError: the file is not an ONNX graph.
    """
    sizes = {BATCH: 1, **{name: axis.optimum for name, axis in artifact.manifest.axes.items() if name != BATCH}}
    return precision_of_file(artifact.onnx(graph), artifact.graph(graph).precision, sizes)


def fp32_products(artifact: Artifact, graph: str) -> int:
    """Products that a graph computes in fp32 as it should; 0 for a graph that is not as requested.

    Errors as `precision_of`.
    """
    counted = precision_of(artifact, graph)
    return 0 if counted.foreign else counted.products.get("fp32", 0)


def precision_of_file(file: Path, asked: Precision, sizes: Mapping[str, int] | None = None) -> PrecisionReport:
    """Counts an ONNX file; the weights themselves are not read.

    Args:
        file: the graph.
        asked: its precision in the manifest.
        sizes: of dynamic axes, to count the operations of an fp8 graph.
    """
    require_onnx()
    model = read_graph(file)
    dtypes = _dtypes(model)
    narrow = _dequantised(model, dtypes)
    kept: Precision = BESIDE_FP8 if asked == "fp8" else asked
    listed = _Listed(model, dtypes) if kept in HALF else None
    weights: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        kind = dtypes[tensor.name]
        table = listed is not None and kind == "fp32" and listed.read(tensor.name)
        if len(tensor.dims) >= _WEIGHT_RANK and kind is not None and not table:
            weights[kind] += math.prod(tensor.dims)
    products: Counter[str] = Counter()
    others: Counter[str] = Counter()
    foreign = []
    large = _large_products(model) if asked == "fp8" else frozenset()
    for node in model.graph.node:
        kind = _precision(node, dtypes)
        if kind is None or node.op_type in _MOVES:
            continue
        product = node.op_type in PRODUCTS | INT8_PRODUCTS
        if product and narrow.issuperset(node.input[:2]):
            kind = "fp8"
        (products if product else others)[kind] += 1
        wanted: Precision = "fp8" if node.output[0] in large else kept
        if not _allowed(node, kind, wanted, listed, product=product):
            foreign.append(f"{module_of(node) or 'the graph itself'}: {node.op_type} ({kind})")
    # weights of another dtype that are cast before the product would not show in the count of products
    stray = {name: n for name, n in weights.items() if name not in (asked, kept)}
    # an 8-bit graph keeps its first and last layers in fp32; otherwise only what computes in fp32 may be stored in fp32
    if (asked != "int8" and stray) or sum(stray.values()) > weights[asked]:
        foreign.insert(0, f"weights: {', '.join(f'{n} elements {name}' for name, n in sorted(stray.items()))}")
    if asked in ("int8", "fp8") and not products[asked]:
        foreign.insert(0, f"products: none is {asked}")
    operations = _operations(model, dtypes, narrow, sizes) if asked == "fp8" and sizes else {}
    return PrecisionReport(dict(weights), dict(products), dict(others), tuple(dict.fromkeys(foreign)), operations)


def read_graph(file: Path) -> ModelProto:
    """An ONNX model without its external weights.

    Raises:
        CheckpointError: the file is damaged or not an ONNX model.
    """
    import onnx

    try:
        return onnx.load(str(file), load_external_data=False)
    except Exception as error:
        # protobuf's own DecodeError is in a different module for each of its implementations
        raise CheckpointError(
            f"{file} is not an ONNX file ({type(error).__name__})", "Restore the artifact, or export it again."
        ) from None


def module_of(node: NodeProto) -> str:
    """Dotted name of the torch module that a node was traced in, without the operation; may be empty."""
    scopes = scopes_of(node)
    return scopes[-1] if scopes else ""


def scopes_of(node: NodeProto) -> list[str]:
    """Dotted names of the modules around a node, outermost first, without the wrapper."""
    text = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
    # a list of quoted names, written by the exporter; the last one is the operation
    names = re.findall(r"'([^']*)'", text)[:-1]
    return [name.removeprefix("inner.") for name in names if name not in ("", "inner")]


class _Listed:
    """The nodes and stored tables of a graph that are fp32 according to `STAYS_FP32`.

    Args:
        model: the graph; its nodes are in an order in which they can run.
        dtypes: dtypes of its values.
    """

    def __init__(self, model: ModelProto, dtypes: Mapping[str, str | None]) -> None:
        # weights are in the weight file; constants that the tracer folded are in the graph
        sources = {x.name: _source(x) for x in model.graph.initializer}
        sources |= {x.name: frozenset({x.name if x.name in _PLAIN_INPUTS else _DATA}) for x in model.graph.input}
        self._with_softmax = {module_of(node) for node in model.graph.node if node.op_type == "Softmax"}
        self._readers: dict[str, list[NodeProto]] = {}
        self._entries: dict[str, str] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
            read = [sources.get(name, frozenset()) for name in node.input]
            found = frozenset[str]() if node.op_type in _SIZES else frozenset[str]().union(*read)
            sources |= dict.fromkeys(node.output, found)
            if node.op_type not in _MOVES and _precision(node, dtypes) == "fp32":
                self._entries |= dict.fromkeys(node.output, self._entry(node, read))

    def computed(self, node: NodeProto) -> bool:
        """Whether a node is fp32 according to the list."""
        return any(self._entries.get(name) for name in node.output)

    def read(self, name: str) -> bool:
        """Whether a stored value is read, directly or moved, only by nodes that are fp32 according to the list."""
        pending, found = list(self._readers.get(name, ())), False
        while pending:
            node = pending.pop()
            if node.op_type in _MOVES:
                pending += [reader for output in node.output for reader in self._readers.get(output, ())]
            elif not self.computed(node):
                return False
            else:
                found = True
        return found

    def _entry(self, node: NodeProto, read: Sequence[frozenset[str]]) -> str:
        """The list's entry for an fp32 node whose inputs come from `read`; empty for none."""
        module, (linear, of_linear) = module_of(node), _LINEAR
        if linear.search(module) and module not in self._with_softmax and node.op_type in of_linear:
            return LINEAR_ATTENTION
        if node.op_type in PRODUCTS:
            return ""
        if not any(_DATA in source for source in read):
            return TIMES
        for entry, (modules, operators) in _PLACES.items():
            if modules.search(module) and node.op_type in operators:
                return entry
        if _ATTENTION.search(module):
            by_table = node.op_type == "Mul" and any(source and source <= _IDS | {_TABLE} for source in read)
            of_both = node.op_type == "Add" and all(self._entries.get(name) == ROTATION for name in node.input)
            # FLUX.3 negates halves that are fp32 already, the other families before the cast; both are exact
            return ROTATION if by_table or of_both or node.op_type == "Neg" else ""
        return ""


def _source(tensor: TensorProto) -> frozenset[str]:
    """Where a stored value comes from: the weight file, or a table or a number that the tracer folded."""
    if tensor.external_data:
        return frozenset({_DATA})
    return frozenset({_TABLE} if len(tensor.dims) >= _WEIGHT_RANK else ())


def _allowed(node: NodeProto, kind: str, asked: Precision, listed: _Listed | None, *, product: bool) -> bool:
    if asked == "fp32":
        # sinusoids of positions are in double precision in diffusers, which does no harm
        return kind == "fp32" or (kind == "fp64" and not product)
    if asked == "int8":
        return node.op_type in FP32_IN_INT8 or kind != "fp32" or not product
    return kind == asked or (listed is not None and listed.computed(node))


def _dequantised(model: ModelProto, dtypes: Mapping[str, str | None]) -> frozenset[str]:
    """Values that have been rounded to fp8: a product of two of them is an fp8 product."""
    nodes = (node for node in model.graph.node if node.op_type == "DequantizeLinear")
    return frozenset(node.output[0] for node in nodes if dtypes.get(node.input[0]) == "fp8")


def _large_products(model: ModelProto) -> frozenset[str]:
    """Results of the products with weights that an fp8 graph computes in fp8."""
    shapes = {x.name: tuple(x.dims) for x in model.graph.initializer}
    moved = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in _WEIGHT_MOVES}
    found = set()
    for node in model.graph.node:
        if node.op_type not in MATRIX_PRODUCTS:
            continue
        name = node.input[1]
        while name in moved:
            name = moved[name]
        if name in shapes and in_fp8(model_name(name), shapes[name]):
            found.add(node.output[0])
    return frozenset(found)


def _operations(
    model: ModelProto, dtypes: Mapping[str, str | None], narrow: frozenset[str], sizes: Mapping[str, int]
) -> dict[str, int]:
    """Multiply-accumulates by dtype at these sizes of the dynamic axes; empty if a shape cannot be inferred."""
    shapes = _shapes(model, sizes)
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        kind = _precision(node, dtypes)
        if node.op_type not in PRODUCTS or kind is None:
            continue
        left, right, out = (shapes.get(name, [0]) for name in (*node.input[:2], node.output[0]))
        # each number of the result is a sum over the last axis of the left, or over the kernel of a convolution
        number = math.prod(out) * (math.prod(right[1:]) if node.op_type == "Conv" else left[-1])
        if number == 0:
            return {}
        counts["fp8" if narrow.issuperset(node.input[:2]) else kind] += number
    return dict(counts)


def _shapes(model: ModelProto, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Shapes of all values at these sizes of the dynamic axes; 0 for what cannot be inferred."""
    import onnx
    import onnx_ir as ir

    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for value in (*sized.graph.input, *sized.graph.value_info, *sized.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            # the tracer writes sums such as `image + text`
            found = ir.SymbolicDim(axis.dim_param).evaluate(dict(sizes)) if axis.dim_param else None
            if found is not None:
                axis.dim_value = found
    known = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    values = (*known.input, *known.value_info, *known.output)
    shapes = {x.name: [axis.dim_value for axis in x.type.tensor_type.shape.dim] for x in values}
    return shapes | {x.name: list(x.dims) for x in known.initializer}


def _precision(node: NodeProto, dtypes: Mapping[str, str | None]) -> str | None:
    """The floating-point type that a node computes in; None for nodes without one."""
    if node.op_type in INT8_PRODUCTS:
        return "int8"
    if node.op_type in PRODUCTS:
        kinds = {dtypes.get(name) for name in node.input if name} - {None}
        return str(max(kinds, key=lambda kind: {"fp64": 8, "fp32": 4}.get(str(kind), 2))) if kinds else None
    return dtypes.get(node.output[0]) if node.output else None


def _dtypes(model: ModelProto) -> dict[str, str | None]:
    """Floating-point or 8-bit type of every value, as stated in the file or found by shape inference."""
    import onnx

    graph = model.graph
    known = {value.name for value in graph.value_info}
    missing = [name for node in graph.node for name in node.output if name and name not in known]
    if len(missing) > len(graph.output):
        graph = onnx.shape_inference.infer_shapes(model).graph
    name_of = onnx.TensorProto.DataType.Name
    values = {x.name: x.type.tensor_type.elem_type for x in (*graph.input, *graph.value_info, *graph.output)}
    values |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name: _NAMES.get(name_of(element)) for name, element in values.items()}
