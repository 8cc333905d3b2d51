from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from fmg.core.errors import CheckpointError, MissingDependencyError
from fmg.export import onnx as tracer
from fmg.export.graphs import GraphModule, GraphPlan, transformer_plan
from fmg.export.onnx import check_file, save_graph, trace
from fmg.export.quantization import transpose_weights
from fmg.export.weights import lay_out, write_weights
from fmg.inference.artifact.manifest import TensorSpec

pytestmark = pytest.mark.compile

BATCH = (TensorSpec("x", "float32", ("batch", 4)),)
OUT = (TensorSpec("y", "float32", ("batch", 4)),)


class Twins(GraphModule):
    """Two layers with equal weights, which an optimiser that saw values would merge."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner[1](torch.relu(self.inner[0](x)))  # type: ignore[no-any-return]


def twins(dtype: torch.dtype = torch.float32, outputs: tuple[TensorSpec, ...] = OUT) -> GraphPlan:
    def build() -> GraphModule:
        inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        for layer in inner:
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        return Twins(inner)

    return GraphPlan("twins", build, dtype, BATCH, outputs)


@pytest.mark.slow
def test_equal_weights_stay_apart_and_keep_name_shape_and_place(tmp_path: Path) -> None:
    traced = trace(twins())
    shapes = {"0.weight": (4, 4), "0.bias": (4,), "1.weight": (4, 4), "1.bias": (4,)}
    assert dict(traced.parameters) == shapes
    layout = lay_out({name: (torch.float32, shape) for name, shape in shapes.items()})
    values = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())}
    write_weights(tmp_path / "w.safetensors", layout, values.__getitem__)
    save_graph(traced, tmp_path / "g.onnx", "w.safetensors", layout.places)
    loaded = onnx.load(str(tmp_path / "g.onnx"))
    stored = {x.name: onnx.numpy_helper.to_array(x) for x in loaded.graph.initializer}
    assert all((stored[name] == values[name].numpy()).all() for name in shapes)


def test_a_graph_that_is_not_as_planned_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'y'.* is not the planned"):
        trace(twins(outputs=(TensorSpec("y", "int64", ("batch", 4)),)))


def test_a_truncated_graph_and_weights_of_another_dtype_are_refused(tmp_path: Path) -> None:
    traced = trace(twins())
    half = lay_out({name: (torch.float16, shape) for name, shape in traced.parameters.items()})
    with pytest.raises(CheckpointError, match=r"is torch\.float16 .* but FLOAT"):
        save_graph(traced, tmp_path / "g.onnx", "w", half.places)
    layout = lay_out({name: (torch.float32, shape) for name, shape in traced.parameters.items()})
    write_weights(tmp_path / "w", layout, lambda name: torch.zeros(traced.parameters[name]))
    save_graph(traced, tmp_path / "g.onnx", "w", layout.places)
    content = (tmp_path / "g.onnx").read_bytes()
    (tmp_path / "g.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is not a valid ONNX graph"):
        check_file(tmp_path / "g.onnx")


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        MissingDependencyError, match=r"needs the package 'onnxscript'.* pip install 'flow-map-grpo\[onnx\]'"
    ):
        tracer.require_onnx()


@pytest.mark.slow
def test_a_bf16_transformer_has_bf16_weights_and_fp32_inputs_outputs_and_times() -> None:
    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
        "time_scale": 1.0,
        "second_time": "target",
    }
    traced = trace(transformer_plan(config, torch.bfloat16))
    graph = traced.model.graph
    assert {str(graph.initializers[name].dtype) for name in traced.parameters} == {"BFLOAT16"}
    assert {str(value.dtype) for value in (*graph.inputs, *graph.outputs)} == {"FLOAT"}
    assert "timestep_embedder2.linear_1.weight" in traced.parameters
    assert "time_text_embed.guidance_embedder.linear_1.weight" in traced.parameters
    # bf16 would round 0.999 to 1 before the sinusoid
    assert {str(node.inputs[0].dtype) for node in graph.all_nodes() if node.op_type in ("Sin", "Cos")} == {"FLOAT"}
    assert not [node for node in graph.all_nodes() for x in node.outputs if str(x.dtype) == "DOUBLE"]


class Floored(nn.Linear):
    """A layer whose forward creates a constant, as transformers' masks do in some versions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, super().forward(x), torch.tensor(0.5, device=x.device))


class OfFloored(GraphModule):
    """`Floored` inside a graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def test_a_number_that_a_forward_writes_down_keeps_its_value() -> None:
    graph = trace(GraphPlan("floored", lambda: OfFloored(Floored(4, 4)), torch.float32, BATCH, OUT))
    assert set(graph.parameters) == {"weight", "bias"}
    initializers = graph.model.graph.initializers
    written = [value.const_value for name, value in initializers.items() if name not in graph.parameters]
    assert 0.5 in [x.numpy().item() for x in written if x is not None]


_TRANSPOSED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[2, 2] x) => (float[2, 3] y, float[2, 1, 3] z)
<float[3, 2] weight = {0, 1, 2, 3, 4, 5}, float[1, 2, 3] table = {0, 1, 2, 3, 4, 5}>
{
  turned = Transpose <perm = [1, 0]> (weight)
  y = MatMul (x, turned)
  z = Transpose <perm = [1, 0, 2]> (table)
}
"""


def test_only_matrices_are_stored_transposed() -> None:
    """A transposed table, as AuraFlow's positions, is not the weight of a product."""
    model = ir.from_proto(onnx.parser.parse_model(_TRANSPOSED))
    assert transpose_weights(model) == {"weight.transposed": "weight"}
    assert set(model.graph.initializers) == {"weight.transposed", "table"}
