"""A transformer whose large matrix products are 8-bit floats (E4M3), for GPUs of compute capability 8.9 and newer.

Both sides of such a product are rounded to E4M3, with one scale per tensor. In the graph this is a QuantizeLinear and a
DequantizeLinear before the product, which an engine fuses into an fp8 product; weights are stored in 8 bits. Everything
else is bf16: products of activations (attention), the embeddings of the inputs, norms with the modulation that they
contain, and the last layer. These are few of the operations but cause much of the error.

A weight's scale is its largest entry over the largest E4M3 number. That of an activation comes from a calibration
(`fmg.export.calibration`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmg.export.onnx import TracedGraph
from fmg.export.quantization import TRANSPOSED, stored_weight, transpose_weights

if TYPE_CHECKING:
    import onnx_ir as ir

Read = Callable[[str, torch.dtype], Tensor]
"""Reads a weight by its name in a dtype."""

LARGEST = 448.0
"""The largest number of E4M3."""
_E4M3 = torch.float8_e4m3fn
_SCALE, _INPUT_SCALE, _ZERO = "_scale", ".input_scale", "fp8.zero"
_WEIGHT = ".weight"
_BLOCK = re.compile(r"\.\d+\.")
_KEPT = re.compile(r"norm|embed|modulation|adaln", re.IGNORECASE)
# fp8 kernels need rows of a multiple of 16 bytes
_ALIGNED = 16


def in_fp8(name: str, shape: Iterable[int]) -> bool:
    """Whether the product with a weight is one of those computed in fp8: linear layers of the transformer's blocks."""
    return (
        name.endswith(_WEIGHT)
        and _BLOCK.search(name) is not None
        and _KEPT.search(name) is None
        and all(size % _ALIGNED == 0 for size in shape)
    )


def fp8_modules(graph: TracedGraph) -> tuple[str, ...]:
    """Names of the linear layers of a traced graph whose products become fp8."""
    return tuple(name.removesuffix(_WEIGHT) for name in _products(graph.model))


def scale_of(largest: float) -> float:
    """The scale of a tensor by its largest magnitude, a bf16 number so that every graph can state it exactly."""
    return float(torch.tensor(largest / LARGEST, dtype=torch.bfloat16)) or 1.0


def rounded(exact: Tensor, scale: float) -> Tensor:
    """fp32 values divided by a scale, in E4M3; values out of range saturate."""
    return (exact / scale).clamp(-LARGEST, LARGEST).to(_E4M3)


@dataclass(frozen=True)
class Fp8Graph:
    """A graph with fp8 products. The scales of weights get their values when the weights are read.

    Attributes:
        graph: the graph; `parameters` has names and shapes as they are stored.
        sources: names of the model's weights by the names of the 8-bit weights that come from them.
    """

    graph: TracedGraph
    sources: Mapping[str, str]

    def reading(self, read: Read) -> Read:
        """Reads weights as they are stored, each rounded once from fp32.

        Args:
            read: reads the model's weights.
        """

        def stored(name: str, dtype: torch.dtype) -> Tensor:
            if name not in self.sources:
                return read(name, dtype)
            exact = as_stored(name, read(self.sources[name], torch.float32))
            scale = scale_of(float(exact.abs().max()))
            self._set_scale(self.sources[name] + _SCALE, scale)
            return rounded(exact, scale)

        return stored

    def _set_scale(self, name: str, scale: float) -> None:
        value = self.graph.model.graph.initializers[name]
        value.const_value = _scalar(name, scale, value.dtype)


def as_stored(name: str, weight: Tensor) -> Tensor:
    """A weight as it is stored under a name."""
    return weight.T.contiguous() if name.endswith(TRANSPOSED) else weight


def quantise(graph: TracedGraph, inputs: Mapping[str, float]) -> Fp8Graph:
    """A copy of a traced bf16 graph whose products `fp8_modules` are in fp8.

    Args:
        graph: remains as it is.
        inputs: largest magnitude of the input of each of these layers.
    """
    import onnx_ir as ir

    model = graph.model.clone()
    for name in graph.parameters:
        # a graph that has been saved points into that file
        model.graph.initializers[name].const_value = None
    wanted = {f"{module}{_WEIGHT}" for module in fp8_modules(graph)}
    stored = transpose_weights(model, wanted.__contains__)
    stored |= {name: name for name in wanted if name in model.graph.initializers}
    sources = dict(sorted(stored.items()))
    zero = ir.Value(name=_ZERO, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT8E4M3FN))
    zero.const_value = _scalar(_ZERO, 0.0, ir.DataType.FLOAT8E4M3FN)
    model.graph.initializers.add(zero)
    readers: dict[ir.Value, dict[ir.Node, str]] = {}
    for name, source in sources.items():
        module = source.removesuffix(_WEIGHT)
        for node in _dequantise_weight(model, model.graph.initializers[name], source, zero):
            readers.setdefault(_present(node.inputs[0]), {})[node] = module
    for value, modules in readers.items():
        scale = scale_of(max(inputs[module] for module in modules.values()))
        _quantise_input(model, value, modules, scale, zero)
    shapes = {name: tuple(int(size) for size in _present(model.graph.initializers[name].shape)) for name in sources}
    kept = {name: shape for name, shape in graph.parameters.items() if name not in sources.values()}
    return Fp8Graph(replace(graph, model=model, parameters={**kept, **shapes}), sources)


def other_rounding(name: str, stored: Tensor, exact: Tensor, scales: Mapping[str, float], *, summed: bool) -> bool:
    """Whether an 8-bit weight is not the rounding of the model's weight.

    Args:
        name: its name in the file.
        stored: as in the file.
        exact: the model's weight, fp32.
        scales: `stored_scales` of its graph.
        summed: whether the weight is a sum, which another CPU may round to a neighbouring number.
    """
    expected = as_stored(name, exact)
    scale = scales.get(model_name(name) + _SCALE, 0.0)
    wanted = scale_of(float(expected.abs().max()))
    steps = 1 if summed else 0
    if stored.shape != expected.shape or abs(scale - wanted) > steps * wanted * 2**-7:
        return True
    return bool(((_number(stored) - _number(rounded(expected, scale))).abs() > steps).any())


def model_name(name: str) -> str:
    """The model's name of a weight that is stored under `name`."""
    return name.removesuffix(TRANSPOSED)


def stored_scales(graph: Path) -> dict[str, float]:
    """The scales that an ONNX file states, of weights and of inputs, by their names in it."""
    import onnx_ir as ir

    initializers = ir.load(graph).graph.initializers.items()
    return {
        name: float(value.const_value.numpy())
        for name, value in initializers
        if name.endswith((_SCALE, _INPUT_SCALE)) and value.const_value is not None and value.const_value.size == 1
    }


def input_scales(scales: Mapping[str, float]) -> dict[str, float]:
    """Of `stored_scales`, those of inputs, by the name of the first layer that reads the input."""
    return {name.removesuffix(_INPUT_SCALE): x for name, x in scales.items() if name.endswith(_INPUT_SCALE)}


def _products(model: ir.Model) -> tuple[str, ...]:
    """The weights of the products that become fp8, in the order of the graph."""
    weights = (stored_weight(node) for node in model.graph)
    found = ((str(x.name), [int(size) for size in _present(x.shape)]) for x in weights if x is not None)
    return tuple(dict.fromkeys(name for name, shape in found if in_fp8(name, shape)))


def _dequantise_weight(model: ir.Model, weight: ir.Value, source: str, zero: ir.Value) -> list[ir.Node]:
    """Stores a weight in E4M3 and dequantises it before its first product; returns its products."""
    import onnx_ir as ir

    kept, users = _present(weight.dtype), list(weight.consumers())
    scale = ir.Value(name=source + _SCALE, shape=ir.Shape([]), type=ir.TensorType(kept))
    model.graph.initializers.add(scale)
    weight.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    made = ir.Value(name=f"{source}_dequantized", shape=weight.shape, type=ir.TensorType(kept))
    ir.convenience.replace_all_uses_with(weight, made)
    node = ir.Node("", "DequantizeLinear", [weight, scale, zero], outputs=[made], name=f"{source}.dequantize")
    _insert(model, [node], users)
    return users


def _quantise_input(
    model: ir.Model, value: ir.Value, modules: Mapping[ir.Node, str], scale: float, zero: ir.Value
) -> None:
    """Rounds what several products read to E4M3, once for all of them."""
    import onnx_ir as ir

    kept, module = _present(value.dtype), modules[_first(model, modules)]
    name = module + _INPUT_SCALE
    stated = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(kept))
    stated.const_value = _scalar(name, scale, kept)
    model.graph.initializers.add(stated)
    kind = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    narrow = ir.Value(name=f"{module}.input_quantized", shape=value.shape, type=kind)
    wide = ir.Value(name=f"{module}.input_dequantized", shape=value.shape, type=ir.TensorType(kept))
    nodes = [
        ir.Node("", "QuantizeLinear", [value, stated, zero], outputs=[narrow], name=f"{module}.quantize_input"),
        ir.Node("", "DequantizeLinear", [narrow, stated, zero], outputs=[wide], name=f"{module}.dequantize_input"),
    ]
    _insert(model, nodes, modules)
    for reader in modules:
        reader.replace_input_with(0, wide)


def _insert(model: ir.Model, nodes: Sequence[ir.Node], readers: Iterable[ir.Node]) -> None:
    """Inserts nodes before the first of their readers, as part of its module."""
    first = _first(model, readers)
    for node in nodes:
        node.metadata_props.update(first.metadata_props)
    model.graph.insert_before(first, nodes)


def _first(model: ir.Model, nodes: Iterable[ir.Node]) -> ir.Node:
    wanted = set(nodes)
    return next(node for node in model.graph if node in wanted)


def _scalar(name: str, number: float, kind: ir.DataType | None) -> ir.TensorProtocol:
    import onnx_ir as ir

    return ir.tensor(number, dtype=_present(kind), name=name)


def _number(weight: Tensor) -> Tensor:
    """E4M3 numbers as their index in increasing order, so that neighbours differ by 1."""
    bits = weight.view(torch.uint8).to(torch.int16)
    return torch.where(bits >= 128, 128 - bits, bits)


def _present(value: Any) -> Any:
    assert value is not None
    return value
