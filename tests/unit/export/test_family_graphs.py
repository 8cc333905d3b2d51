"""Transformers of families without an exported artifact: each traces to a graph, which ONNX Runtime reproduces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from fmg.export.graphs import GraphModule, GraphPlan
from fmg.export.onnx import save_graph, trace
from fmg.export.weights import lay_out, write_weights
from fmg.inference.artifact.manifest import BATCH, IMAGE, TEXT, TensorSpec
from fmg.models.common.adapter import is_under
from fmg.models.flux3.size import UNUSED
from tests.tiny_flux2 import flux2_transformer
from tests.tiny_flux3 import flux3_transformer
from tests.tiny_sd35 import flow_map_transformer

pytestmark = [pytest.mark.compile, pytest.mark.slow]

SIDE = 8
GATE = 1e-4
"""Relative difference in fp32, as `fmg verify` allows it."""


class _TokenVelocity(GraphModule):
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


class _LatentVelocity(GraphModule):
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        second: Tensor,
    ) -> Tensor:
        output: Tensor = self.inner(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            second=second,
        )[0]
        return output


Axes = tuple[int | str, ...]


@dataclass(frozen=True)
class GraphCase:
    """A transformer, its wrapper with a flat signature, and the axes of inputs and output by its config."""

    name: str
    build: Callable[[], Any]
    wrapper: type[GraphModule]
    axes: Callable[[Any], dict[str, Axes]]
    output: Callable[[Any], Axes]
    unused: tuple[str, ...] = ()


def _token_axes(config: Any) -> dict[str, Axes]:
    return {
        "hidden_states": (BATCH, IMAGE, config.in_channels),
        "encoder_hidden_states": (BATCH, TEXT, config.joint_attention_dim),
        "timestep": (BATCH,),
        "img_ids": (IMAGE, 4),
        "txt_ids": (TEXT, 4),
    }


def _two_time_axes(config: Any) -> dict[str, Axes]:
    axes = _token_axes(config)
    return {"target_timestep": axes["timestep"], **axes}


def _sd3_axes(config: Any) -> dict[str, Axes]:
    return {
        "hidden_states": (BATCH, config.in_channels, SIDE, SIDE),
        "encoder_hidden_states": (BATCH, TEXT, config.joint_attention_dim),
        "pooled_projections": (BATCH, config.pooled_projection_dim),
        "timestep": (BATCH,),
        "second": (BATCH,),
    }


CASES = (
    GraphCase(
        "flux2-klein", flux2_transformer, _TokenVelocity, _token_axes, lambda config: (BATCH, IMAGE, config.in_channels)
    ),
    GraphCase(
        "flux3-klein",
        flux3_transformer,
        _TokenVelocity,
        _two_time_axes,
        lambda config: (BATCH, IMAGE, config.in_channels),
        UNUSED,
    ),
    # the crop of the table of positions fixes the size of an image
    GraphCase(
        "sd35-meanflow",
        flow_map_transformer,
        _LatentVelocity,
        _sd3_axes,
        lambda config: (BATCH, config.out_channels, SIDE, SIDE),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_graph_gives_the_numbers_of_the_module(case: GraphCase, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = case.build().eval().requires_grad_(False)
    inputs = tuple(TensorSpec(name, "float32", axes) for name, axes in case.axes(module.config).items())
    output = TensorSpec("velocity", "float32", case.output(module.config))
    plan = GraphPlan(case.name, lambda: case.wrapper(case.build()), torch.float32, inputs, (output,), strict=False)
    traced, weights = trace(plan), module.state_dict()
    assert traced.parameters.keys() <= {name for name in weights if not is_under(name, case.unused)}
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
