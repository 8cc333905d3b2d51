"""A bf16 graph where nothing computes in bf16: the same nodes and the same values of every weight, in fp32.

ONNX Runtime has no bf16 products on a CPU. What such a copy computes differs from the graph's own result only by the
rounding of bf16 arithmetic, so it tells whether nodes and weights are right, and not how far that rounding goes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fmg.core.files import link_file
from fmg.export.census import read_graph
from fmg.export.space import check_space
from fmg.export.weights import lay_out, write_weights
from fmg.inference.artifact.layout import Artifact
from fmg.models.common.weights import TensorReader

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto


@contextmanager
def widened(artifact: Artifact) -> Iterator[Artifact]:
    """A temporary copy of an artifact whose bf16 graphs compute in fp32; its manifest lists no hashes of its own.

    Raises:
        UsageError: the disk of temporary files is too small.
        CheckpointError: a file is missing or damaged.
    """
    graphs = artifact.manifest.graphs
    narrow = {name: graph for name, graph in graphs.items() if graph.precision == "bf16"}
    rewritten = {file for graph in narrow.values() for file in (graph.file, graph.weights)}
    with tempfile.TemporaryDirectory(prefix="fmg-") as place:
        folder = Path(place)
        check_space(
            folder,
            2 * sum(artifact.path(graph.weights).stat().st_size for graph in narrow.values()),
            "A copy of the bf16 weights in fp32",
            "Free some space, set TMPDIR to a folder on another disk, or verify on a GPU.",
        )
        for name in artifact.manifest.files.keys() - rewritten:
            link_file(artifact.path(name), folder / name)
        for name, graph in narrow.items():
            _widen(artifact, name, folder / graph.file, folder / graph.weights)
        wide = {name: replace(graph, precision="fp32") for name, graph in narrow.items()}
        yield Artifact(folder, replace(artifact.manifest, graphs={**graphs, **wide}))


def _widen(artifact: Artifact, name: str, file: Path, weights: Path) -> None:
    """Writes one graph and its weights."""
    model = read_graph(artifact.onnx(name))
    stored = TensorReader.of(artifact.path(artifact.graph(name).weights))
    layout = lay_out({tensor: (torch.float32, stored.describe(tensor)[1]) for tensor in stored.names})
    write_weights(weights, layout, lambda tensor: stored.read(tensor).float())
    for tensor in model.graph.initializer:
        if tensor.external_data:
            place = layout.places[tensor.name]
            del tensor.external_data[:]
            for key, value in (("location", weights.name), ("offset", place.offset), ("length", place.length)):
                tensor.external_data.add(key=key, value=str(value))
            tensor.data_type = _fp32(tensor.data_type)
        else:
            _widen_tensor(tensor)
    _widen_types(model)
    file.write_bytes(model.SerializeToString())


def _widen_types(model: ModelProto) -> None:
    """Makes fp32 of every bf16 that values and nodes state."""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = _fp32(value.type.tensor_type.elem_type)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
            elif attribute.name in ("to", "dtype"):
                attribute.i = _fp32(attribute.i)


def _widen_tensor(tensor: TensorProto) -> None:
    from onnx import numpy_helper

    if _fp32(tensor.data_type) != tensor.data_type:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _fp32(kind: int) -> int:
    """The ONNX type of a widened value."""
    from onnx import TensorProto

    return int(TensorProto.FLOAT) if kind == TensorProto.BFLOAT16 else kind
