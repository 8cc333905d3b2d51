"""Writes a traced graph of an artifact with its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from fmg.core.events import Observer, StageProgress
from fmg.export.fp8 import Fp8Graph, Read
from fmg.export.onnx import TracedGraph, save_graph, stored_dtype
from fmg.export.weights import lay_out, write_weights
from fmg.inference.artifact.layout import file_entry, graph_file, weights_file
from fmg.inference.artifact.manifest import FileEntry, Graph, Precision

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
"""Dtype in which a transformer is traced, by the precision of the export."""
_NAMES: Mapping[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MEGABYTE = 10**6


def write_graph(
    folder: Path, traced: TracedGraph | Fp8Graph, read: Read, observer: Observer
) -> tuple[Graph, dict[str, FileEntry]]:
    """Writes the ONNX file and the weight file of a graph.

    Args:
        folder: of the artifact.
        traced: the graph.
        read: reads the model's weights.
        observer: receives the progress.

    Returns:
        The manifest's entries of graph and files.
    """
    if isinstance(traced, Fp8Graph):
        precision: Precision = "fp8"
        graph, read = traced.graph, traced.reading(read)
    else:
        precision = _NAMES[traced.plan.dtype]
        graph = traced
    plan, initializers = graph.plan, graph.model.graph.initializers
    dtypes = {name: stored_dtype(initializers[name]) for name in graph.parameters}
    layout = lay_out({name: (dtypes[name], shape) for name, shape in graph.parameters.items()})
    weights, file = weights_file(plan.name), graph_file(plan.name)

    def written(done: int, total: int) -> None:
        stage = f"weights of {plan.name} (MB)"
        observer(StageProgress(stage, math.ceil(done / _MEGABYTE), math.ceil(total / _MEGABYTE)))

    entry = write_weights(folder / weights, layout, lambda name: read(name, dtypes[name]), written)
    save_graph(graph, folder / file, weights, layout.places)
    files = {weights: entry, file: file_entry(folder / file)}
    return Graph(file, weights, precision, plan.inputs, plan.outputs), files
