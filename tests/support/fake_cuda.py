"""The CUDA side of the stand-in for TensorRT, on the CPU: work happens when it is queued."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fmg.core.profiling import StageClock, wall_clock
from tests.support.fake_device import DEVICE, STREAM


class FakeCuda:
    """`fmg.inference.cuda_device.Device` on the CPU."""

    torch_device = torch.device("cpu")

    @contextmanager
    def working(self) -> Iterator[int]:
        yield STREAM

    def synchronize(self) -> None:
        assert DEVICE.recording is None, "synchronized while a stream is captured"
        DEVICE.record("synchronize")

    def capture(self, enqueue: Callable[[int], None]) -> Callable[[], None]:
        DEVICE.recording = work = []
        try:
            enqueue(STREAM)
        finally:
            DEVICE.recording = None
        DEVICE.kept += work

        def replay() -> None:
            DEVICE.record("replay")
            for execute in work:
                execute()

        return replay

    def clock(self) -> StageClock[Any]:
        return wall_clock()

    def reset_peak_memory(self) -> None:
        return None

    def peak_memory(self) -> int:
        return 0

    def free_memory(self) -> int:
        return 0
