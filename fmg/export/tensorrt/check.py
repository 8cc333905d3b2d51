"""Checks of finished engines: the types they compute in, and for refittable ones that no bias was lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fmg.core.errors import FmgError
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import Precision, TensorSpec
from fmg.inference.tensorrt.engine import Device, Engine, RunOptions
from fmg.inference.tensorrt.precision_report import Census
from fmg.inference.tensorrt.records import ShapeRange
from fmg.inference.tensorrt.refit import Refit, refuse_lost_biases


def check_network(graph: str, layers: Mapping[str, Mapping[str, int]], precision: Precision) -> None:
    """Whether the network that was parsed computes in the precision of its graph.

    Raises:
        FmgError: it does not; TensorRT is strongly typed, so neither would its engine.
    """
    if problem := Census(layers).problem(precision):
        raise FmgError(
            f"The engine of {graph} would not compute in {precision}: {problem}",
            "Export the artifact again; the precision of an engine is that of its graph.",
        )


def check_refit(
    trt: ModuleType, plan: Path, artifact: Artifact, graph: str, profile: Mapping[str, ShapeRange], device: Device
) -> None:
    """Whether a refittable engine still depends on each of its biases.

    Raises:
        FmgError: it lost one.
    """
    engine = Engine(trt, plan, device, RunOptions(cuda_graphs=False))
    try:
        inputs = _inputs(artifact.graph(graph).inputs, profile, device)
        output = artifact.graph(graph).outputs[0].name
        lost = Refit(trt, engine, artifact, graph).check_biases(lambda: engine.run(inputs)[output])
    finally:
        engine.close()
    refuse_lost_biases(lost, graph)


def _inputs(specs: tuple[TensorSpec, ...], profile: Mapping[str, ShapeRange], device: Device) -> dict[str, Tensor]:
    """The same inputs each time: token ids of 0 and 1, everything else standard normal."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for spec in specs:
        shape = profile[spec.name].minimum
        if spec.dtype == "int64":
            values = torch.randint(2, shape, generator=generator)
        else:
            values = torch.randn(shape, generator=generator)
        made[spec.name] = values.to(device.torch_device)
    return made
