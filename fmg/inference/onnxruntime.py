"""Graphs on ONNX Runtime: numpy arrays on a CPU, torch CUDA tensors bound in place on a GPU.

onnxruntime is imported when the first runtime is created; torch only for a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmg.core.display import counted
from fmg.core.errors import CheckpointError, FmgError, MissingDependencyError, UsageError, reason
from fmg.core.machine import peak_rss, reset_peak_rss
from fmg.core.profiling import StageClock, wall_clock
from fmg.inference.artifact.backend import artifact_backend, checked_batch
from fmg.inference.artifact.layout import Artifact, open_artifact
from fmg.inference.artifact.manifest import TRANSFORMER, TRANSFORMER_INT8, Graph
from fmg.inference.generator import DEFAULT_BATCH, Generator
from fmg.version import install_line

if TYPE_CHECKING:
    import torch

NAME = "onnxruntime"
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
INSTALL = f"Run: {install_line('onnx')}"
INSTALL_GPU = "Run: pip install onnxruntime-gpu in place of onnxruntime, on a machine with an NVIDIA GPU."

_NOT_COMPUTED = {CPU: ("bf16", "fp8"), CUDA: ("fp8",)}
# ONNX Runtime writes only fatal errors to stderr; the others are raised, and reported in one line
_LOG_LEVEL = 4
# the maximum of --threads
_MOST_THREADS = 1024


class PrecisionError(UsageError):
    """A graph in a precision that the provider cannot compute in. Exit code 2."""


def installed() -> Any:
    """The onnxruntime module.

    Raises:
        MissingDependencyError: it is not installed, or cannot be loaded.
    """
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded: {error}"
        raise MissingDependencyError(f"onnxruntime {reason}", INSTALL) from None
    return onnxruntime


def load(
    folder: str | Path,
    *,
    threads: int | None = None,
    batch_size: int | None = None,
    resolution: int | None = None,
    int8: bool = False,
) -> Generator:
    """The sampler of an artifact on a CPU, for programs with only onnxruntime, numpy and tokenizers.

    Args:
        folder: what `fmg export` wrote.
        threads: per operator; None takes OMP_NUM_THREADS, or else all cores.
        batch_size: images per forward pass; None takes the default.
        resolution: side of the square image in pixels; None is the artifact's own.
        int8: run its int8 transformer.

    Raises:
        CheckpointError: a file is missing, damaged, or not the exported one.
        UsageError: the artifact has no such resolution, batch size or transformer.
        MissingDependencyError: onnxruntime is not installed.

    Example:
        >>> from fmg.inference.onnxruntime import load
        >>> with load("artifact") as generator:  # doctest: +SKIP
        ...     images = generator.generate(["a red circle"], seeds=[0]).image_array
    """
    artifact = open_artifact(folder)
    sampling = artifact.manifest.sampling
    size = checked_batch(artifact, batch_size, DEFAULT_BATCH)
    runtime = OnnxRuntime(artifact, threads=threads)
    backend = artifact_backend(artifact, runtime, resolution=resolution, transformer=transformer_graph(artifact, int8))
    return Generator(backend, sampling.grid, sampling.steps, size)


def transformer_graph(artifact: Artifact, int8: bool) -> str:
    """The name of the transformer's graph.

    Raises:
        UsageError: the artifact has no int8 transformer.
    """
    name = TRANSFORMER_INT8 if int8 else TRANSFORMER
    if name not in artifact.manifest.graphs:
        raise UsageError(
            f"The artifact {artifact.folder} has no int8 transformer", "Export with --int8, or leave out --int8."
        )
    return name


class _SessionRuntime:
    """Shared parts of the runtimes on all devices."""

    name = NAME

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def free(self, graphs: Iterable[str]) -> None:
        self._sessions.drop(graphs)

    def clock(self) -> StageClock[Any]:
        """Wall-clock time: `run` returns when its work is done."""
        return wall_clock()

    def reset_peak_memory(self) -> None:
        # the peak of the process: ONNX Runtime does not report its memory on a device
        reset_peak_rss()

    def peak_memory(self) -> int:
        return peak_rss()

    def close(self) -> None:
        self._sessions.drop(None)


class OnnxRuntime(_SessionRuntime):
    """One session per graph on a CPU, with all of ONNX Runtime's optimisations. Implements `GraphRuntime`.

    Args:
        artifact: the graphs.
        threads: per operator; None takes OMP_NUM_THREADS, or else all cores.
    """

    device = "cpu"

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        super().__init__(Sessions(artifact, [CPU], threads))

    @property
    def detail(self) -> str:
        threads = self._sessions.threads
        return f"{CPU}, {counted(threads, 'thread') if threads else 'all cores'}"

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The output of a graph.

        Raises:
            FmgError: the graph cannot be loaded, or does not run on these inputs.
        """
        (output,) = self.outputs(graph, inputs).values()
        return np.asarray(output, np.float32)

    def outputs(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs of a graph by name; errors as `run`."""
        session = self._sessions.get(graph)
        try:
            values = session.run(None, dict(inputs))
        except Exception as error:
            raise _failed(graph, error) from error
        return dict(zip((entry.name for entry in session.get_outputs()), values, strict=True))

    def put(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def get(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        return array


class BoundOnnxRuntime(_SessionRuntime):
    """One session per graph, with inputs and outputs on the device as torch tensors. Implements `GraphRuntime`.

    Args:
        artifact: the graphs.
        device: a torch device; `cpu` works as well.
        providers: execution providers, the preferred one first.
        threads: as `OnnxRuntime`.
    """

    def __init__(
        self, artifact: Artifact, device: torch.device, providers: Sequence[str], *, threads: int | None = None
    ) -> None:
        self._artifact = artifact
        self._device = device
        super().__init__(Sessions(artifact, providers, threads, device_id=device.index or 0))

    @property
    def detail(self) -> str:
        return f"{self._sessions.providers[0]}, IO binding"

    @property
    def device(self) -> str:
        return str(self._device)

    def run(self, graph: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The output of a graph, in its own memory.

        Raises:
            FmgError: the graph cannot be loaded, or does not run on these inputs.
        """
        (output,) = self.outputs(graph, inputs).values()
        return output

    def outputs(self, graph: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All outputs of a graph by name; errors as `run`."""
        import torch

        session, described = self._sessions.get(graph), self._artifact.graph(graph)
        binding = session.io_binding()
        where = (self._device.type, self._device.index or 0)
        kept = {name: tensor.contiguous() for name, tensor in inputs.items()}
        for name, tensor in kept.items():
            kind = np.int64 if tensor.dtype == torch.int64 else np.float32
            binding.bind_input(name, *where, kind, tuple(tensor.shape), tensor.data_ptr())
        names = [spec.name for spec in described.outputs]
        for name in names:
            binding.bind_output(name, *where)
        if self._device.type == "cuda":
            # the session has a stream of its own, which does not wait for torch's
            torch.cuda.current_stream(self._device).synchronize()
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise _failed(graph, error) from error
        return dict(zip(names, map(torch.utils.dlpack.from_dlpack, binding.get_outputs()), strict=True))

    def put(self, array: NDArray[Any]) -> torch.Tensor:
        import torch

        return torch.from_numpy(array).to(self._device)

    def get(self, array: torch.Tensor) -> NDArray[np.float32]:
        host: NDArray[np.float32] = array.cpu().numpy()
        return host


class Sessions:
    """The sessions of an artifact's graphs, each opened when it is first needed.

    Args:
        artifact: the graphs.
        providers: execution providers, the preferred one first; the CPU is always the last.
        threads: threads per operator; None takes OMP_NUM_THREADS, or else all cores.
        device_id: index of the GPU.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        UsageError: it was built without the first provider.
    """

    def __init__(
        self, artifact: Artifact, providers: Sequence[str], threads: int | None = None, device_id: int = 0
    ) -> None:
        check_provider(providers[0])
        self.providers = tuple(dict.fromkeys((*providers, CPU)))
        self.threads = threads or _threads_of_openmp()
        self._artifact = artifact
        self._device_id = device_id
        self._sessions: dict[str, Any] = {}

    def get(self, graph: str) -> Any:
        """The session of a graph.

        Raises:
            PrecisionError: the provider cannot compute in the graph's precision.
            CheckpointError: the graph cannot be loaded.
            FmgError: the provider cannot be started.
        """
        if graph not in self._sessions:
            self._sessions[graph] = self._load(graph)
        return self._sessions[graph]

    def drop(self, graphs: Iterable[str] | None) -> None:
        """Frees the sessions of these graphs; None: all."""
        for graph in list(self._sessions) if graphs is None else graphs:
            self._sessions.pop(graph, None)

    def _load(self, graph: str) -> Any:
        self._check_precision(graph, self._artifact.graph(graph))
        file = self._artifact.onnx(graph)
        try:
            return open_session(str(file), self.providers, self.threads, self._device_id)
        except FmgError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{file} cannot be loaded: {reason(error)}", "Run fmg verify on the artifact, or export it again."
            ) from error

    def _check_precision(self, name: str, graph: Graph) -> None:
        provider = self.providers[0]
        if graph.precision not in _NOT_COMPUTED.get(provider, ()):
            return
        if graph.precision == "fp8":
            raise PrecisionError(
                f"The graph '{name}' is fp8, which ONNX Runtime does not compute",
                "Build engines for a GPU (fmg export ARTIFACT --trt), or export with another --precision.",
            )
        raise PrecisionError(
            f"The graph '{name}' is {graph.precision}, which ONNX Runtime cannot compute on a CPU",
            "Export with --precision fp32 for a CPU, or use a GPU.",
        )


def check_provider(provider: str) -> None:
    """Checks that this onnxruntime has an execution provider.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        UsageError: it was built without the provider.
    """
    if provider not in installed().get_available_providers():
        raise UsageError(f"This onnxruntime has no {provider}", INSTALL_GPU)


def open_session(graph: str | bytes, providers: Sequence[str], threads: int, device_id: int = 0) -> Any:
    """An inference session with all of ONNX Runtime's optimisations.

    Args:
        graph: path of the file, or its content.
        providers: execution providers, the preferred one first.
        threads: per operator; 0: all cores.
        device_id: which GPU.

    Raises:
        FmgError: the provider cannot be started. An unusable graph raises ONNX Runtime's own exceptions.
    """
    library = installed()
    options = library.SessionOptions()
    options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = _LOG_LEVEL
    placed = [name if name == CPU else (name, {"device_id": device_id}) for name in providers]
    session = library.InferenceSession(graph, options, providers=placed)
    if session.get_providers()[0] != providers[0]:
        raise FmgError(
            f"ONNX Runtime cannot start {providers[0]} here and fell back to {session.get_providers()[0]}",
            "Check the driver and the CUDA libraries, or use --device cpu.",
        )
    return session


def _threads_of_openmp() -> int:
    """The outermost number of OMP_NUM_THREADS (`4` of `4,2`); 0, meaning all cores, if it is not set."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    number = int(first) if first.isascii() and first.isdecimal() else 0
    return number if number <= _MOST_THREADS else 0


def _failed(graph: str, error: Exception) -> FmgError:
    return FmgError(f"The graph '{graph}' failed: {reason(error)}", "Run fmg verify on the artifact.")
