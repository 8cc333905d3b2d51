"""The machine of a run or a measurement, and the memory that it took. Names no person and no path.

Does not import torch by itself.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fmg.core.json_io import JsonError, read_object, write_json
from fmg.version import __version__

ENVIRONMENT = "environment.json"
"""The file of a run that contains its `environment`."""

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "scipy", "pillow", "onnxruntime")
_LIBRARIES = ("numpy", "onnxruntime", "torch", "diffusers", "tensorrt", "tensorrt-rtx-cu13")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# The value that resets VmHWM, the peak of resident memory
_RESET_PEAK = "5"


def machine() -> dict[str, Any]:
    """Processor, cores, system, GPUs and library versions of a measurement, as JSON values."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpus": _gpus(),
        "python": platform.python_version(),
        "libraries": {"fmg": __version__, **installed_versions(_LIBRARIES)},
    }


def environment() -> dict[str, str]:
    """The facts that a reader needs to repeat a run, by name, as text."""
    return {
        "fmg": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "devices": ", ".join(_gpus()) or "CPU",
    } | {name: installed_version(name) or "not installed" for name in _PACKAGES}


def write_environment(run: Path) -> None:
    """Writes `environment.json` into a run folder."""
    write_json(run / ENVIRONMENT, environment())


def read_environment(run: Path) -> Mapping[str, str]:
    """The environment of a run; empty when it was not recorded or is damaged."""
    try:
        return {name: str(value) for name, value in read_object(run / ENVIRONMENT).items()}
    except (OSError, JsonError):
        return {}


def installed_version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed, by name."""
    return {name: found for name in packages if (found := installed_version(name)) is not None}


def reset_peak_rss() -> None:
    """Starts a new measurement of `peak_rss` on Linux; elsewhere the peak is that of the whole process."""
    with suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)


def peak_rss() -> int:
    """Maximum bytes of physical memory that the process held at once."""
    with suppress(OSError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _gpus() -> list[str]:
    # a program that has not imported torch has not used a GPU
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


DEVICE_NAME = r"^(auto|cpu|cuda(:\d{1,3})?)$"


def device_name(value: str) -> str:
    """The name of a device, which this machine may not have.

    Raises:
        ValueError: no machine has a device of this name.
    """
    if re.fullmatch(DEVICE_NAME, value) is None:
        raise ValueError("must be auto, cpu, cuda or cuda:INDEX")
    return value
