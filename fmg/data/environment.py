"""The environment of a run: versions, processor, devices. Nothing in it names a person, a machine or a path."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fmg.core.json_reader import JsonError, read_object
from fmg.core.unfinished import write_atomic
from fmg.version import __version__

FILE = "environment.json"
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "scipy", "pillow", "onnxruntime")


def environment() -> dict[str, str]:
    """What a reader needs to repeat a run, by name, as text."""
    found = {
        "fmg": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "devices": _devices(),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_environment(run: Path) -> None:
    """Writes `environment.json` into a run folder."""
    write_atomic(run / FILE, (json.dumps(environment(), indent=2) + "\n").encode())


def read_environment(run: Path) -> Mapping[str, str]:
    """The environment of a run; empty when it was not recorded or is damaged."""
    try:
        return {name: str(value) for name, value in read_object(run / FILE).items()}
    except (OSError, JsonError):
        return {}


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _devices() -> str:
    # a program that has not imported torch trains nothing
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "CPU"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
