"""The CUDA side of running an engine: a stream to queue work on, and recording that work to replay it as one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from fmg.core.errors import UsageError
from fmg.core.profiling import StageClock
from fmg.inference.backend import cuda_clock
from fmg.inference.devices import pick_device

Enqueue = Callable[[int], None]
"""Queues work on the stream with this handle."""


class Device(Protocol):
    """What an engine needs of CUDA. The tests pass their own, which does the same on a CPU."""

    @property
    def torch_device(self) -> torch.device:
        """Where tensors live."""

    @contextmanager
    def working(self) -> Iterator[int]:
        """The handle of the stream that engines run on, after everything that was queued before.

        What is queued after the body waits for it.
        """

    def synchronize(self) -> None:
        """Waits until that stream has nothing left to do."""

    def capture(self, enqueue: Enqueue) -> Callable[[], None]:
        """Records what `enqueue` queues, without running it; the result replays it on that stream."""

    def clock(self) -> StageClock[Any]:
        """A clock of the caller's stream."""

    def reset_peak_memory(self) -> None:
        """Begins a new measurement of `peak_memory`."""

    def peak_memory(self) -> int:
        """Most bytes that torch held since the last reset. What TensorRT takes by itself is not in it."""

    def free_memory(self) -> int:
        """Free bytes of the device, as its driver says."""


class CudaDevice:
    """A GPU. Engines run on a stream of their own: on the default stream TensorRT synchronizes again and again.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def torch_device(self) -> torch.device:
        """The GPU."""
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
        """Waits for the stream."""
        self._stream.synchronize()

    def capture(self, enqueue: Enqueue) -> Callable[[], None]:
        """A CUDA graph of what `enqueue` queues."""
        graph = torch.cuda.CUDAGraph()
        # thread-local: the default refuses whatever another thread, such as a progress bar's, asks of CUDA meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            enqueue(int(self._stream.cuda_stream))
        return graph.replay

    def clock(self) -> StageClock[Any]:
        """CUDA events on the caller's stream."""
        return cuda_clock(self._device)

    def reset_peak_memory(self) -> None:
        """Of torch's allocator."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_memory(self) -> int:
        """Of torch's allocator."""
        return torch.cuda.max_memory_allocated(self._device)

    def free_memory(self) -> int:
        """After pending work, because the driver frees late."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.mem_get_info(self._device)[0]


def open_device(name: str) -> Device:
    """The GPU called `name` (`auto`, `cuda` or `cuda:N`).

    Raises:
        UsageError: it is not there, or no GPU.
    """
    device = pick_device(name)
    if device.type != "cuda":
        raise UsageError("TensorRT engines run on a GPU, and torch sees none here", "Use --backend onnxruntime.")
    return CudaDevice(torch.device("cuda", device.index or 0))
