"""What the 8-bit formats of a transformer share: products with stored weights, and weights as the products read them.

Quantisers do not look through a Transpose, and neither do all engines, so a weight that is transposed for a product is
stored as the product reads it, under a name that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

PRODUCTS = ("MatMul", "Gemm")
TRANSPOSED = ".transposed"
"""End of the name of a weight that is stored transposed."""


def stored_weight(node: ir.Node) -> ir.Value | None:
    """The stored weight that a product multiplies with, directly or transposed; None for a product of activations."""
    if node.op_type not in PRODUCTS:
        return None
    value = node.inputs[1]
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
    return value if value is not None and value.is_initializer() else None


def transpose_weights(model: ir.Model, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """Replaces each transposed matrix by a stored one; returns the new names with those that they come from.

    Args:
        model: changed in place. Weights may have no values yet.
        wanted: whether a weight of this name is replaced.
    """
    import onnx_ir as ir

    replaced = {}
    for node in list(model.graph.all_nodes()):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or not source.is_initializer() or not wanted(str(source.name)):
            continue
        # not a table of positions, which no product reads
        if (permutation := list(node.attributes["perm"].as_ints())) != [1, 0]:
            continue
        name = f"{source.name}{TRANSPOSED}"
        if name not in model.graph.initializers:
            assert source.shape is not None
            shape = ir.Shape([source.shape[axis] for axis in permutation])
            weight = ir.Value(name=name, shape=shape, type=source.type)
            if source.const_value is not None:
                values = np.ascontiguousarray(source.const_value.numpy().transpose(permutation))
                weight.const_value = ir.Tensor(values, name=name)
            model.graph.initializers.add(weight)
        replaced[name] = str(source.name)
        ir.convenience.replace_all_uses_with(node.outputs[0], model.graph.initializers[name])
        model.graph.remove(node, safe=True)
        if not source.uses():
            del model.graph.initializers[str(source.name)]
    return replaced
