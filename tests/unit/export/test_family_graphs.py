"""Transformers of families without an exported artifact: each traces to a graph, which ONNX Runtime reproduces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from fmg.export.graphs import GraphModule, GraphPlan
from fmg.export.onnx import save_graph, trace
from fmg.export.weights import lay_out, write_weights
from fmg.inference.artifact.manifest import BATCH, IMAGE, TEXT, TensorSpec
from tests.tiny_flux2 import flux2_transformer

pytestmark = [pytest.mark.compile, pytest.mark.slow]

GATE = 1e-4
"""Relative difference in fp32, as `fmg verify` allows it."""


class _Velocity(GraphModule):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        target_timestep: Tensor | None = None,
        *,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> Tensor:
        second = {} if target_timestep is None else {"target_timestep": target_timestep}
        output: Tensor = self.inner(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
            **second,
        )[0]
        return output


@dataclass(frozen=True)
class GraphCase:
    name: str
    build: Callable[[], torch.nn.Module]
    times: tuple[str, ...]


CASES = (GraphCase("flux2-klein", flux2_transformer, ("timestep",)),)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_graph_gives_the_numbers_of_the_module(case: GraphCase, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = case.build().eval().requires_grad_(False)
    config = module.config
    inputs = (
        TensorSpec("hidden_states", "float32", (BATCH, IMAGE, config.in_channels)),
        TensorSpec("encoder_hidden_states", "float32", (BATCH, TEXT, config.joint_attention_dim)),
        *(TensorSpec(name, "float32", (BATCH,)) for name in case.times),
        TensorSpec("img_ids", "float32", (IMAGE, 4)),
        TensorSpec("txt_ids", "float32", (TEXT, 4)),
    )
    output = TensorSpec("velocity", "float32", (BATCH, IMAGE, config.in_channels))
    traced = trace(GraphPlan(case.name, lambda: _Velocity(case.build()), torch.float32, inputs, (output,)))
    weights = module.state_dict()
    assert traced.parameters.keys() <= weights.keys()
    layout = lay_out({name: (torch.float32, shape) for name, shape in traced.parameters.items()})
    write_weights(tmp_path / "weights.safetensors", layout, weights.__getitem__)
    save_graph(traced, tmp_path / "graph.onnx", "weights.safetensors", layout.places)
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    # sizes other than those that were traced
    for sizes in ({BATCH: 1, IMAGE: 16, TEXT: 7}, {BATCH: 3, IMAGE: 4, TEXT: 20}):
        given = {spec.name: torch.rand([sizes.get(axis, axis) for axis in spec.shape]) for spec in inputs}  # type: ignore[call-overload]
        with torch.no_grad():
            expected = module(**given, return_dict=False)[0].numpy()
        (ours,) = session.run(None, {name: x.numpy() for name, x in given.items()})
        assert np.abs(ours - expected).max() <= GATE * np.abs(expected).max()
