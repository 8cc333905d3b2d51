"""Checks of finished engines: the types they compute in, and for refittable ones that no bias was lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fmg.core.errors import FmgError
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import Check, Precision, TensorSpec
from fmg.inference.tensorrt.census import Census, inspect
from fmg.inference.tensorrt.device import Device
from fmg.inference.tensorrt.engine import Engine, RunOptions
from fmg.inference.tensorrt.record import EngineRecord, ShapeRange
from fmg.inference.tensorrt.refit import Refit, refuse_lost_biases
from fmg.inference.tensorrt.runtime import EngineRuntime

CENSUS = "engine-census"


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


def census_checks(
    artifact: Artifact, records: Mapping[str, EngineRecord], runtime: EngineRuntime | None
) -> list[Check]:
    """The census of every engine, as proofs for the manifest.

    Args:
        artifact: the engines' artifact.
        records: the engine of every graph.
        runtime: the engines on a GPU, which their inspector then describes; None: the networks that they were built
            from, which need none.
    """
    return [_census_check(artifact, graph, record, runtime) for graph, record in records.items()]


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


def _census_check(artifact: Artifact, graph: str, record: EngineRecord, runtime: EngineRuntime | None) -> Check:
    census = Census(record.layers) if runtime is None else inspect(runtime.trt, runtime.engine(graph))
    problem = census.problem(artifact.graph(graph).precision)
    return Check(
        name=f"{CENSUS}/{record.plan.removesuffix('.plan')}",
        passed=not problem,
        values={name: float(count) for name, count in census.types.items()},
        note=problem or ("of the parsed network" if runtime is None else "of the engine's inspector"),
        weights=artifact.manifest.weights_digest(),
    )


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
