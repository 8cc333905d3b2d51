"""The backend `torch-compile`: the network under `torch.compile`, on a GPU replayed as one CUDA graph per shape.

Batches are padded to powers of two, so there are few shapes. torch's own guards choose the code for the current shapes,
adapter and precision, and recompile if something differs. Recordings are made below the guards, so an outdated one is
never replayed. Weights are not copied: they may be trained in between.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sysconfig
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fmg.core.cache import cache_dir
from fmg.core.display import counted
from fmg.core.errors import CompositionError, FmgWarning, MissingDependencyError, UsageError, reason
from fmg.core.profiling import WARM_UP, stage
from fmg.core.protocols import FlowMap, Model, Rerouted
from fmg.flow.maps import PaddedBatches
from fmg.inference.cuda_device import CudaDevice, Device
from fmg.inference.torch_backend import TorchBackend

NAME = "torch-compile"
COMPILER = "inductor"
"""The backend of `torch.compile` that compiles the traced graph."""
MAX_COMPILATIONS = 16
"""Maximum compilations of one network: the buckets of batches up to 64 images, with an adapter and without."""

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# By then, kernels are loaded and chosen, and have their workspaces
_RUNS_BEFORE_RECORDING = 2


class CompiledNetwork:
    """A network under `torch.compile`, on its live weights. Called as the module is.

    A network that cannot be compiled, and shapes beyond `MAX_COMPILATIONS`, run in the module itself, after one warning
    with the cause. Compile time counts as the stage `WARM_UP`.

    Args:
        module: the network.
        gpu: records each compiled shape as a CUDA graph; None does not.
        instead: what to do where it cannot be compiled; with it, that is an error.
    """

    def __init__(self, module: nn.Module, gpu: Device | None = None, *, instead: str | None = None) -> None:
        _place_cache()
        # imported here because it takes seconds; its warnings are about torch's own modules
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import torch._inductor.compile_fx
            from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
            from torch._inductor.exc import InductorError

        def call(**inputs: Any) -> Any:
            return module(**inputs)

        # torch counts and limits compilations by code object: a copy keeps those of other networks apart
        call.__code__ = call.__code__.replace()
        self._failures = (TorchDynamoException, InductorError)
        self._limit = FailOnRecompileLimitHit
        self._module = module
        self._gpu = gpu
        self._instead = instead
        self._lock = RLock()
        self._shapes: set[object] = set()
        self._latest: frozenset[str] = frozenset()
        self._full = False
        self._eager = False
        self.compilations = 0
        """Number of times that the network was compiled."""
        self.seconds = 0.0
        """Seconds spent on compiling and recording."""
        self._call: Callable[..., Any] = torch.compile(call, backend=self._compile, dynamic=False, fullgraph=True)

    def refresh(self) -> None:
        """Does nothing: the weights are shared."""

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """The output of the module.

        Raises:
            CompositionError: it cannot be compiled here, and `instead` is given.
        """
        with self._lock:
            if self._eager:
                return self._module(**inputs)
            leaves, spec = pytree.tree_flatten(inputs)
            # one tensor passed twice would be compiled separately from two equal ones
            leaves = [leaf.clone() if _seen(leaves, i) else leaf for i, leaf in enumerate(leaves)]
            inputs = pytree.tree_unflatten(leaves, spec)
            shape = (spec, *(_shape(leaf) for leaf in leaves))
            if shape not in self._shapes and not self._prepared(shape, inputs):
                return self._module(**inputs)
            try:
                return self._compiled(inputs)
            except (*self._failures, self._limit) as error:
                self._give_up(error)
                return self._module(**inputs)

    def _compiled(self, inputs: dict[str, Any]) -> Any:
        """Calls the compiled network; raises what torch raises where it cannot be compiled."""
        try:
            return self._call(**inputs)
        except self._limit:
            # torch's own limit is lower, and setting it takes too long for every call
            if self.compilations >= MAX_COMPILATIONS:
                raise
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILATIONS):
            return self._call(**inputs)

    def _prepared(self, shape: object, inputs: dict[str, Any]) -> bool:
        """Compiles a new shape; returns whether it may be called."""
        named = _named_shapes(inputs)
        if self.compilations >= MAX_COMPILATIONS:
            if not self._full:
                self._full = True
                new = ", ".join(sorted(named - self._latest))
                _warn(
                    f"The network was compiled {self.compilations} times, for different shapes. Further shapes run"
                    f" eagerly, the first of them {new}. Use fewer batch sizes and resolutions in one process."
                )
            return False
        began = time.perf_counter()
        try:
            with stage(WARM_UP):
                if not self._shapes:
                    # tables that a module makes at its first call, as Z-Image does, cannot be made while it is traced
                    self._module(**inputs)
                self._compiled(inputs)
        except (*self._failures, self._limit) as error:
            self._give_up(error)
            return False
        finally:
            self.seconds += time.perf_counter() - began
        self._shapes.add(shape)
        self._latest = named
        return True

    def _give_up(self, error: BaseException) -> None:
        """Runs the module itself from now on; raises if `instead` is given."""
        if isinstance(error, self._limit):
            why = (
                f"it was compiled {self.compilations} times, because its adapter, its precision or the number of its"
                " weights keeps changing (TORCH_LOGS=recompiles shows why)"
            )
        else:
            while (inner := getattr(error, "inner_exception", None)) is not None:
                error = inner
            why = reason(error)
        if self._instead is not None:
            raise CompositionError(f"The network cannot be compiled here: {why}", self._instead) from error
        self._eager = True
        _warn(f"The network is no longer compiled and runs eagerly: {why}")

    def _compile(self, graph: Any, examples: list[Tensor]) -> Callable[..., Any]:
        """The function that `torch.compile` calls with each traced graph."""
        self.compilations += 1
        with stage(WARM_UP):
            compiled: Callable[..., Any] = torch._dynamo.lookup_backend(COMPILER)(graph, examples)
        return compiled if self._gpu is None else _Recorded(compiled, self._gpu)


class _Recorded:
    """A compiled graph that replays itself as a CUDA graph. Parameters are read in place, other inputs are copied.

    A CUDA graph contains addresses. If those of the parameters have changed, it is recorded again.
    """

    def __init__(self, run: Callable[..., Any], gpu: Device) -> None:
        self._run = run
        self._gpu = gpu
        self._places: tuple[int, ...] = ()
        self._held: list[Any] = []
        self._outputs: list[Tensor] = []
        self._replay: Callable[[], None] | None = None
        self._recordable = True

    def __call__(self, *given: Any) -> Any:
        if not self._recordable:
            return self._run(*given)
        places = tuple(x.data_ptr() for x in given if isinstance(x, nn.Parameter))
        if self._replay is None or places != self._places:
            with stage(WARM_UP):
                self._record(given, places)
        if self._replay is None:
            return self._run(*given)
        with self._gpu.working():
            for held, x in zip(self._held, given, strict=True):
                if held is not x and isinstance(x, Tensor) and not isinstance(x, nn.Parameter):
                    held.copy_(x)
            self._replay()
            return tuple(output.clone() for output in self._outputs)

    def _record(self, given: Sequence[Any], places: tuple[int, ...]) -> None:
        self._replay, self._places = None, places
        self._held = [x.clone() if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) else x for x in given]
        with self._gpu.working():
            for _ in range(_RUNS_BEFORE_RECORDING):
                results = self._run(*self._held)
            self._outputs = [torch.empty_like(x) for x in results]
        self._gpu.synchronize()

        def enqueue(_: int) -> None:
            for output, x in zip(self._outputs, self._run(*self._held), strict=True):
                output.copy_(x)

        try:
            self._replay = self._gpu.capture(enqueue)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._recordable = False
            _warn(f"The compiled network is not recorded as a CUDA graph: {reason(error)}")


class TorchCompileBackend(TorchBackend):
    """A loaded model whose network is compiled; text encoders and decoder are eager.

    Args:
        model: what is sampled.
        cuda_graphs: whether a GPU replays each shape as a CUDA graph.

    Raises:
        UsageError: the network of the model cannot be replaced.
    """

    name = NAME

    def __init__(self, model: Model, *, cuda_graphs: bool = True) -> None:
        super().__init__(model)
        if not isinstance(model, Rerouted):
            raise UsageError(f"This model cannot be compiled: {type(model).__name__}", "Use --backend torch.")
        self.network = CompiledNetwork(model.network, _recorder(model.device) if cuda_graphs else None)
        self._recorded = cuda_graphs and self._device.type == "cuda"
        self._flow_map = PaddedBatches(model.flow_map_through(self.network), bucket)

    @property
    def detail(self) -> str:
        """The compiler, how often it ran, and the threads of a CPU."""
        parts = [COMPILER, *(["CUDA graphs"] if self._recorded else [])]
        if self.network.compilations:
            parts.append(f"{counted(self.network.compilations, 'compilation')} in {self.network.seconds:.0f} s")
        if self._device.type == "cpu":
            parts.append(counted(torch.get_num_threads(), "thread"))
        return ", ".join(parts)

    @property
    def flow_map(self) -> FlowMap:
        return self._flow_map


def bucket(rows: int) -> int:
    """The number of rows that a batch is padded to: the next power of two."""
    return 1 << max(rows - 1, 0).bit_length()


def compiled_network(model: Model, *, instead: str | None = None) -> CompiledNetwork:
    """The network of a model, compiled, and recorded on a GPU; see `CompiledNetwork`."""
    assert isinstance(model, Rerouted)
    return CompiledNetwork(model.network, _recorder(model.device), instead=instead)


def check_compiler(device: torch.device, instead: str = "use --backend torch") -> None:
    """Whether torch can compile for a device.

    Args:
        device: where the network computes.
        instead: what to do otherwise, for the error.

    Raises:
        MissingDependencyError: a compiler, headers or triton are missing.
    """
    advice = f"or {instead}"
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise MissingDependencyError("torch.compile on a GPU needs triton", f"Run: pip install triton; {advice}.")
        found = os.environ.get("CC") or any(shutil.which(name) for name in ("gcc", "clang", "cc"))
    else:
        found = _has_cpp_compiler()
    if not found:
        raise MissingDependencyError(
            "torch.compile needs a C++ compiler, but found none",
            f"Install g++ (Debian and Ubuntu: apt-get install g++), {advice}.",
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise MissingDependencyError(
            "torch.compile needs Python's header files, which are not installed",
            f"Install them (Debian and Ubuntu: apt-get install python3-dev), {advice}.",
        )


def _has_cpp_compiler() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def _recorder(device: torch.device) -> Device | None:
    return CudaDevice(torch.device("cuda", device.index or 0)) if device.type == "cuda" else None


def _seen(leaves: Sequence[Any], index: int) -> bool:
    return isinstance(leaves[index], Tensor) and any(leaves[index] is leaf for leaf in leaves[:index])


def _named_shapes(inputs: dict[str, Any]) -> frozenset[str]:
    """The shapes of every input that has any, with its name."""
    shapes = {
        name: [x.shape for x in pytree.tree_leaves(value) if isinstance(x, Tensor)] for name, value in inputs.items()
    }
    return frozenset(f"{name} {' '.join(str(tuple(x)) for x in found)}" for name, found in shapes.items() if found)


def _shape(leaf: Any) -> object:
    return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _warn(text: str) -> None:
    warnings.warn(text, FmgWarning, stacklevel=4)


def _place_cache() -> None:
    """Makes inductor keep its kernels in fmg's cache, unless a folder is set. Its default in /tmp is predictable."""
    if _CACHE in os.environ:
        return
    folder = cache_dir() / "inductor"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ[_CACHE] = str(folder)
