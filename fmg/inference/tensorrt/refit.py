"""New weights for a refittable engine without a rebuild, by state-dict name; and a check for lost biases.

Initialisers of the graph and refittable weights of TensorRT have the names of the state dict, so no search for equal
values is needed. The plan on disk never changes: loading it again restores the weights it was built from.

According to the release notes of TensorRT 11.3, a refittable engine may drop the bias of a matrix product, with or
without a refit. `check_biases` detects this without a second implementation: an output that does not depend on a bias
has lost it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fmg.core.errors import CheckpointError, FmgError, UsageError
from fmg.inference.artifact.layout import Artifact
from fmg.inference.tensorrt.engine import DTYPES, Engine

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Refit:
    """Changes the weights of a loaded engine to those of its artifact.

    Args:
        trt: the TensorRT module.
        engine: built with `refittable`.
        artifact: whose weights it gets.
        graph: the graph of the engine.

    Raises:
        UsageError: the engine was not built for it.
    """

    def __init__(self, trt: ModuleType, engine: Engine, artifact: Artifact, graph: str) -> None:
        if not engine.raw.refittable:
            raise UsageError(
                f"The engine of '{graph}' is not refittable", "Build it with fmg export --trt --refittable."
            )
        self._trt: Any = trt
        self._engine = engine
        self._file = artifact.path(artifact.graph(graph).weights)
        self._graph = graph
        self._refitter = trt.Refitter(engine.raw, engine.log)
        self._names: list[str] = sorted(self._refitter.get_all_weights())

    def apply(self) -> int:
        """Sets every weight of the file; returns how many.

        Raises:
            CheckpointError: the file lacks weights that the engine needs.
            FmgError: TensorRT refused a weight or the refit; the engine must be loaded again.
        """
        with safe_open(self._file, framework="pt") as tensors:
            known = set(tensors.keys())
            chosen = [name for name in self._names if name in known]
            # TensorRT reads the memory when it refits, so it has to live until then
            kept = [self._set(name, tensors.get_tensor(name)) for name in chosen]
            if missing := self._refitter.get_missing_weights():
                raise CheckpointError(
                    f"{self._file} lacks the weight '{missing[0]}', which the engine of '{self._graph}' needs",
                    "Build the engine again: fmg export --trt.",
                )
            self._finish()
            del kept
        return len(chosen)

    def check_biases(self, run: Callable[[], Tensor]) -> None:
        """Refuses an engine whose output does not depend on each bias, a refittable weight called `….bias`.

        Each is changed by 1 in turn and set back, which costs two refits and one run per bias.

        Args:
            run: one execution of the engine, always on the same inputs.

        Raises:
            FmgError: it lost a bias.
        """
        reference = run().float()
        lost = []
        with safe_open(self._file, framework="pt") as tensors:
            for name in (name for name in self._names if name.endswith(".bias")):
                value = tensors.get_tensor(name)
                moved = self._set(name, value + 1)
                self._finish()
                if torch.equal(run().float(), reference):
                    lost.append(name)
                del moved
                kept = self._set(name, value)
                self._finish()
                del kept
        if lost:
            raise FmgError(
                f"The refittable engine of '{self._graph}' ignores the bias '{lost[0]}'"
                f"{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}, a known defect of TensorRT 11.3",
                "Build it without --refittable.",
            )

    def _set(self, name: str, value: Tensor) -> Tensor:
        memory = value.contiguous()
        dtype = getattr(self._trt.DataType, _NAMES[memory.dtype])
        if not self._refitter.set_named_weights(name, self._trt.Weights(dtype, memory.data_ptr(), memory.numel())):
            raise self._engine.failure(f"the weight '{name}' was refused in a refit")
        return memory

    def _finish(self) -> None:
        # a recording may hold the addresses of weights that a refit moves
        self._engine.reset()
        if not self._refitter.refit_cuda_engine():
            raise self._engine.failure("the refit failed, and the engine may contain some of the new weights")
