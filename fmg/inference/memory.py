"""The most memory that this process held, measured anew where the system allows it."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# What Linux takes to mean: begin VmHWM anew
_RESET_PEAK = "5"


def reset_peak_rss() -> None:
    """Begins a new measurement, on Linux; elsewhere the peak is that of the whole life of the process."""
    with suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)


def peak_rss() -> int:
    """Most bytes of physical memory that the process held at once."""
    with suppress(OSError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
