"""The graphs of an artifact as engines on one GPU, with torch CUDA tensors as inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmg.core.profiling import StageClock
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import BATCH
from fmg.inference.cuda_device import Device
from fmg.inference.tensorrt.engine import Engine, RunOptions
from fmg.inference.tensorrt.flavours import Flavour
from fmg.inference.tensorrt.precision_report import EnginePrecision, inspect
from fmg.inference.tensorrt.records import EngineRecord, check_plan, needs_refit
from fmg.inference.tensorrt.refit import Refit


class EngineRuntime:
    """One engine per graph, loaded when it is first run. Implements `fmg.inference.artifact.backend.GraphRuntime`.

    Rows beyond the largest batch of an engine are run in several batches, and fewer than its smallest batch are padded;
    the rows of a batch do not depend on each other.

    Args:
        artifact: what the engines were built from.
        records: the engine of every graph.
        flavour: which TensorRT.
        trt: its module.
        device: the GPU.
        options: how to run them.
    """

    def __init__(
        self,
        artifact: Artifact,
        records: Mapping[str, EngineRecord],
        flavour: Flavour,
        trt: ModuleType,
        device: Device,
        options: RunOptions,
    ) -> None:
        self._artifact = artifact
        self._records = records
        self._flavour = flavour
        self._trt = trt
        self._device = device
        self._options = options
        self._engines: dict[str, Engine] = {}
        self._memory: dict[str, int] = {}

    @property
    def name(self) -> str:
        return self._flavour.backend

    @property
    def detail(self) -> str:
        """Version, and the engines by name."""
        names = ", ".join(record.plan.removesuffix(".plan") for record in self._records.values())
        return f"{self._flavour.module} {self._trt.__version__}: {names}"

    @property
    def device(self) -> str:
        return str(self._device.torch_device)

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output of a graph, in its own memory.

        Raises:
            UsageError: the engine was not built for the shapes of the inputs.
            CheckpointError: the engine is damaged, or cannot be loaded here.
            FmgError: TensorRT failed.
        """
        (output,) = self.outputs(graph, inputs).values()
        return output

    def outputs(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs of a graph by name; errors as `run`."""
        engine = self._engine(graph)
        entry = self._artifact.graph(graph)
        rows_of = [spec.name for spec in entry.inputs if spec.shape[:1] == (BATCH,)]
        rows = inputs[rows_of[0]].shape[0]
        least, most = _batch(engine, inputs, rows_of) or (rows, rows)
        parts = []
        for start in range(0, rows, most):
            taken = min(most, rows - start)
            part = {name: x[start : start + taken] if name in rows_of else x for name, x in inputs.items()}
            if taken < least:
                part = {name: _filled(x, least) if name in rows_of else x for name, x in part.items()}
            made = engine.run(part)
            parts.append({spec.name: made[spec.name][:taken] for spec in entry.outputs})
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def precision(self, graph: str) -> EnginePrecision | None:
        """The inspector's report of an engine; None if the engine has no details."""
        return inspect(self._trt, self._engine(graph))

    def free(self, graphs: Iterable[str]) -> None:
        for graph in graphs:
            if (engine := self._engines.pop(graph, None)) is not None:
                engine.close()
                self._memory.pop(graph)

    def put(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device.torch_device)

    def get(self, array: Tensor) -> NDArray[np.float32]:
        host: NDArray[np.float32] = array.cpu().numpy()
        return host

    def clock(self) -> StageClock[Any]:
        return self._device.clock()

    def reset_peak_memory(self) -> None:
        self._device.reset_peak_memory()

    def peak_memory(self) -> int:
        """The peak of torch, plus the memory that engines took when they were loaded."""
        return self._device.peak_memory() + sum(self._memory.values())

    def close(self) -> None:
        self.free(list(self._engines))

    def _engine(self, graph: str) -> Engine:
        if graph not in self._engines:
            record = self._records[graph]
            plan = check_plan(self._artifact.engines, record)
            before = self._device.free_memory()
            engine = Engine(self._trt, plan, self._device, self._options, carries_code=record.carries_code)
            if needs_refit(self._artifact, record):
                Refit(self._trt, engine, self._artifact, graph).apply()
            self._engines[graph] = engine
            self._memory[graph] = max(0, before - self._device.free_memory())
        return self._engines[graph]


def _batch(engine: Engine, inputs: Mapping[str, Tensor], rows_of: list[str]) -> tuple[int, int] | None:
    """Smallest and largest batch of a profile that admits the other axes; None if there is none."""
    for profile in engine.profiles:
        if profile.keys() != inputs.keys():
            continue
        low = profile[rows_of[0]].minimum[0]
        shapes = {name: (low, *x.shape[1:]) if name in rows_of else tuple(x.shape) for name, x in inputs.items()}
        if all(profile[name].admits(shape) for name, shape in shapes.items()):
            return low, profile[rows_of[0]].maximum[0]
    return None


def _filled(tensor: Tensor, rows: int) -> Tensor:
    """The tensor with its last row repeated until there are `rows`."""
    missing = rows - tensor.shape[0]
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
