"""What runs the graphs of an artifact: ONNX Runtime, TensorRT, or another package's runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fmg.core.profiling import StageClock

Array = TypeVar("Array")


class GraphRuntime(Protocol[Array]):
    """Runs graphs by the names of `Manifest.graphs`, each loaded when it is first run.

    `Array` is the runtime's own array type on its device: a numpy array, a torch CUDA tensor. The sampler needs its
    `shape`, `reshape`, `swapaxes` and slices, and arithmetic with its own kind and with Python floats that stays fp32.
    Arrays are float32 or int64, as the borders of the graphs are.
    """

    @property
    def name(self) -> str:
        """Registered name of the backend."""

    @property
    def detail(self) -> str:
        """How it runs, for people: execution provider, engine, threads."""

    @property
    def device(self) -> str:
        """Where it computes: `cpu`, `cuda:0`."""

    def run(self, graph: str, inputs: Mapping[str, Array]) -> Array:
        """The one output of a graph.

        Raises:
            FmgError: the graph cannot be loaded, or the runtime failed; says which graph.
        """

    def free(self, graphs: Iterable[str]) -> None:
        """Gives back the memory of these graphs; they are loaded again when they are next run."""

    def put(self, array: NDArray[Any]) -> Array:
        """A numpy array on the device."""

    def get(self, array: Array) -> NDArray[np.float32]:
        """An array of the device in numpy; waits for the work that makes it."""

    def clock(self) -> StageClock[Any]:
        """As `Backend.clock`."""

    def reset_peak_memory(self) -> None:
        """As `Backend.reset_peak_memory`."""

    def peak_memory(self) -> int:
        """As `Backend.peak_memory`."""

    def close(self) -> None:
        """Frees everything."""
