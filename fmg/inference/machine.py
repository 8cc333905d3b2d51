"""What a measurement was made on: a figure without it says nothing. Imports no torch of its own accord."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fmg.version import __version__

_LIBRARIES = ("numpy", "onnxruntime", "torch", "diffusers", "tensorrt", "tensorrt-rtx-cu13")


def machine() -> dict[str, Any]:
    """Processor, cores, system, GPUs and library versions, as JSON values."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpus": _gpus(),
        "python": platform.python_version(),
        "libraries": {"fmg": __version__}
        | {name: found for name in _LIBRARIES if (found := _version(name)) is not None},
    }


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or "unknown"


def _gpus() -> list[str]:
    # a torch that nobody has imported has not measured anything on a GPU either
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
