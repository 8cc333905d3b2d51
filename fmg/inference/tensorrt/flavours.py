"""The two TensorRT packages, which share one API, and the GPU of this machine."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from fmg.core.errors import MissingDependencyError, reason
from fmg.version import install_line

FlavourName = Literal["tensorrt", "rtx"]

ANY = "any"
"""The GPU in the record of an engine that was built ahead of time, for every GPU that its flavour supports."""


@dataclass(frozen=True)
class Flavour:
    """One of the two packages.

    Attributes:
        name: the value of `--flavour`.
        backend: name of the backend that runs its engines.
        module: what Python imports.
        install: the command that installs it.
        ahead_of_time: whether its builder needs no GPU and its engines are not made for a particular GPU.
    """

    name: FlavourName
    backend: str
    module: str
    install: str
    ahead_of_time: bool


TENSORRT = Flavour(
    "tensorrt",
    "tensorrt",
    "tensorrt",
    f"{install_line('trt')} --extra-index-url https://pypi.nvidia.com",
    ahead_of_time=False,
)
RTX = Flavour("rtx", "tensorrt-rtx", "tensorrt_rtx", install_line("trt-rtx"), ahead_of_time=True)
FLAVOURS: Mapping[str, Flavour] = {flavour.name: flavour for flavour in (TENSORRT, RTX)}


FP8_CAPABILITIES = ("8.9", "12.0", "12.1")
"""Of the compute capabilities that TensorRT-RTX builds for, those with fp8: Ada and Blackwell."""


def has_fp8(gpu: Gpu) -> bool:
    """Whether a GPU computes in fp8."""
    return float(gpu.capability) >= float(FP8_CAPABILITIES[0])


def load_module(flavour: Flavour) -> ModuleType:
    """The Python module of a flavour.

    Raises:
        MissingDependencyError: it is not installed, or only half of it is (bindings without their libraries).
    """
    try:
        return importlib.import_module(flavour.module)
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"The package {flavour.module} cannot be imported ({reason(error)})", f"Install it: {flavour.install}"
        ) from None


def importable(flavour: Flavour) -> bool:
    """Whether the package of a flavour is complete."""
    try:
        load_module(flavour)
    except MissingDependencyError:
        return False
    return True


@dataclass(frozen=True)
class Gpu:
    """A GPU that engines are built for or run on.

    Attributes:
        name: such as `NVIDIA H100 80GB HBM3`.
        capability: compute capability, such as `9.0`.
        driver: major version of the driver, such as `580`; empty if unknown.
    """

    name: str
    capability: str
    driver: str


def current_gpu() -> Gpu | None:
    """The current CUDA device of torch, or None where torch sees none.

    Raises:
        MissingDependencyError: torch, in whose memory engines work, is not installed.
    """
    try:
        import torch
    except ImportError:
        raise MissingDependencyError(
            "TensorRT engines work on tensors of torch, which is not installed", "Install it: pip install torch"
        ) from None

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}.{minor}", _driver_major())


def lists_gpu(module: ModuleType, gpu: Gpu) -> bool:
    """Whether a flavour lists the compute capability of a GPU, as TensorRT-RTX does; one without a list takes all."""
    named = getattr(module, "ComputeCapability", None)
    return named is None or f"SM{gpu.capability.replace('.', '')}" in named.__members__


def _driver_major() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return listed.strip().split("\n")[0].split(".")[0]
