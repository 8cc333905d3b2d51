"""A GPU with a stream on which work is recorded as CUDA graphs and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from fmg.core.profiling import StageClock
from fmg.inference.torch_backend import cuda_clock

Enqueue = Callable[[int], None]
"""Queues work on the stream with this handle."""


class Device(Protocol):
    """The CUDA operations that engines and compiled networks use. Tests pass a replacement that works on a CPU."""

    @property
    def torch_device(self) -> torch.device:
        """Where tensors live."""

    @contextmanager
    def working(self) -> Iterator[int]:
        """The handle of the stream that recorded work runs on, after all previously queued work.

        What is queued after the body waits for it.
        """

    def synchronize(self) -> None:
        """Waits until that stream is idle."""

    def capture(self, enqueue: Enqueue) -> Callable[[], None]:
        """Records what `enqueue` queues, without running it; the result replays it on that stream."""

    def clock(self) -> StageClock[Any]:
        """A clock of the caller's stream."""

    def reset_peak_memory(self) -> None:
        """Starts a new measurement of `peak_memory`."""

    def peak_memory(self) -> int:
        """Maximum bytes that torch has allocated since the last reset, without TensorRT's own allocations."""

    def free_memory(self) -> int:
        """Free bytes of the device, as its driver reports."""


class CudaDevice:
    """A GPU. What is recorded runs on a stream of its own: the default stream cannot be captured, and on it TensorRT
    synchronises repeatedly.

    All recordings share the memory of their intermediate values: they run one after the other on that stream, and
    results are copied out of them.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    @property
    def torch_device(self) -> torch.device:
        return self._device

    @contextmanager
    def working(self) -> Iterator[int]:
        """The stream's handle, between a wait for the caller's stream and one of the caller's stream for it."""
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield int(self._stream.cuda_stream)
        caller.wait_stream(self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def capture(self, enqueue: Enqueue) -> Callable[[], None]:
        """A CUDA graph of what `enqueue` queues."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # thread-local: the default refuses any CUDA call of another thread, such as a progress bar's, meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            enqueue(int(self._stream.cuda_stream))
        return graph.replay

    def clock(self) -> StageClock[Any]:
        return cuda_clock(self._device)

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def free_memory(self) -> int:
        # the driver frees memory late
        torch.cuda.synchronize(self._device)
        return torch.cuda.mem_get_info(self._device)[0]
