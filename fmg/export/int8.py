"""A transformer with 8-bit weights for ONNX Runtime on a CPU.

Signed, one scale per tensor, activations quantised dynamically: the fastest of ONNX Runtime's schemes on a CPU, at
about the same error. Weights use seven of the eight bits: a CPU without VNNI adds pairs of products in 16 bits, which
would saturate (on the embedded model the error of one forward pass is 5 % with eight bits and 2 % with seven).
Attention's products of activations stay fp32, and so do the small first and last layers, through which everything
passes.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fmg.core.errors import MissingDependencyError
from fmg.export.onnx import check_file, point_to, quiet
from fmg.export.quantization import PRODUCTS, TRANSPOSED, transpose_weights
from fmg.export.weights import lay_out, write_weights
from fmg.inference.artifact.layout import file_entry, graph_file, weights_file
from fmg.inference.artifact.manifest import TRANSFORMER_INT8, FileEntry, Graph
from fmg.version import install_line

if TYPE_CHECKING:
    import onnx_ir as ir

BORDERS = ("x_embedder.", "pos_embed.", "context_embedder.", "caption_projection.", "proj_out.")
"""Beginnings of the names of the first and last layers in the classes of diffusers."""
_INLINE_BYTES = 1024
# `_Transposed` and `_quantized` are ONNX Runtime's
_DERIVED = re.compile(rf"(?P<weight>.+?)(?P<turned>{re.escape(TRANSPOSED)}|_Transposed)?(?P<rounded>_quantized)?")
# Half a step is the rounding of the quantiser, the rest that of its fp32 arithmetic
_HALF_STEP = 0.501


def require_quantiser() -> None:
    """Checks that ONNX Runtime's quantiser is installed.

    Raises:
        MissingDependencyError: naming the extra that installs it.
    """
    try:
        import onnxruntime.quantization  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"8-bit weights need the package '{error.name}'", f"Install it: {install_line('onnx')}."
        ) from None


def add_int8(folder: Path, graph: Graph) -> tuple[Graph, dict[str, FileEntry]]:
    """Writes the 8-bit transformer of an artifact; returns its entry in the manifest, and those of its files.

    Args:
        folder: the artifact, or the folder in which it is being written; files of an earlier one are replaced.
        graph: its fp32 transformer.
    """
    file, weights = graph_file(TRANSFORMER_INT8), weights_file(TRANSFORMER_INT8)
    for name in (file, weights):
        # a link of the file may be part of another artifact
        (folder / name).unlink(missing_ok=True)
    quantise(folder / graph.file, folder / file, folder / weights)
    files = {name: file_entry(folder / name) for name in (file, weights)}
    return Graph(file, weights, "int8", graph.inputs, graph.outputs), files


def quantise(graph: Path, out: Path, weights: Path) -> None:
    """Writes a graph with 8-bit matrices beside a graph in fp32.

    Args:
        graph: the fp32 graph with its weights beside it; all matrices are held in memory.
        out: the ONNX file to write.
        weights: the safetensors file to write, in the folder of `out`.
    """
    require_quantiser()
    import onnx_ir as ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".int8.") as scratch:
        plain, quantised = Path(scratch) / "plain.onnx", Path(scratch) / "quantised.onnx"
        model = ir.load(graph)
        transpose_weights(model)
        ir.save(model, plain, external_data="plain.data")
        with quiet():
            quantize_dynamic(
                plain,
                quantised,
                op_types_to_quantize=list(PRODUCTS),
                per_channel=False,
                reduce_range=True,
                nodes_to_exclude=_border_nodes(model),
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
            )
        result = ir.load(quantised)
        _move_weights(result, weights)
        ir.save(result, out)
    check_file(out)


def other_weight(graph: Path, names: Collection[str], read: Callable[[str], torch.Tensor]) -> str:
    """The first weight of an 8-bit graph that is not a rounding of the fp32 weight; empty for none.

    Args:
        graph: what `quantise` wrote.
        names: names of the fp32 weights.
        read: returns the fp32 weight of a name.
    """
    import onnx_ir as ir

    values = {
        name: value.const_value.numpy()
        for name, value in ir.load(graph).graph.initializers.items()
        if value.const_value is not None
    }
    for name, stored in values.items():
        match = _DERIVED.fullmatch(name)
        assert match is not None, name
        if match["weight"] not in names:
            if match["rounded"] or stored.nbytes >= _INLINE_BYTES:
                return f"'{name}' is not a weight of the model"
            continue
        exact = read(match["weight"]).numpy()
        exact = exact.T if match["turned"] else exact
        if not match["rounded"]:
            same = np.array_equal(stored, exact)
        else:
            scale, zero = (values[name.removesuffix("_quantized") + end] for end in ("_scale", "_zero_point"))
            steps = stored.astype(np.float32) - np.float32(zero)
            same = stored.shape == exact.shape and bool((np.abs(steps * scale - exact) <= _HALF_STEP * scale).all())
        if not same:
            return f"'{name}' does not match the weight of the model and the run in 8 bits"
    return ""


def _border_nodes(model: ir.Model) -> list[str]:
    """Names of the products with a weight of `BORDERS`."""
    return [
        str(node.name)
        for node in model.graph.all_nodes()
        if node.op_type in PRODUCTS and any(str(x.name).startswith(BORDERS) for x in node.inputs if x is not None)
    ]


def _move_weights(model: ir.Model, weights: Path) -> None:
    """Moves all but tiny tensors into a safetensors file."""
    values = {
        name: value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes >= _INLINE_BYTES
    }
    arrays = {name: value.const_value for name, value in values.items() if value.const_value is not None}

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(arrays[name].numpy()))

    layout = lay_out({name: (read(name).dtype, tuple(array.shape.numpy())) for name, array in arrays.items()})
    write_weights(weights, layout, read)
    for name, value in values.items():
        point_to(value, weights, layout.places[name])
