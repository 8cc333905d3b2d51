"""Device and dtype by name, checked before anything is loaded."""

from __future__ import annotations

import torch

from fmg.core.display import counted
from fmg.core.errors import UsageError, suggestion
from fmg.core.specs import MapSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The torch device called `name`; `auto` is CUDA where there is one, else the CPU.

    Raises:
        UsageError: for an unknown device, or one that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"'{name}' is not a device", "Use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"The device '{name}' is not there: torch sees {counted(torch.cuda.device_count(), 'CUDA device')}",
            "Use --device cpu, or install a CUDA build of torch on a machine with a GPU.",
        )
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"The device '{name}' is not supported", "Use auto, cpu, cuda or cuda:N.")
    return device


def device_for(name: str, model: str, spec: MapSpec) -> torch.device:
    """The device called `name` for a model; `auto` never means the CPU for a model of full size.

    Raises:
        UsageError: as `pick_device`, or when `auto` finds no GPU for a model that needs one.
    """
    device = pick_device(name)
    if name == "auto" and device.type == "cpu" and spec.gpu_memory_gb:
        raise UsageError(
            f"The model '{model}' needs a GPU with about {spec.gpu_memory_gb:.0f} GB, and torch sees none here",
            f"Use one that has (`fmg fetch {model}` gets the weights there), or --device cpu for minutes an image.",
        )
    return device


def pick_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name` (`fp32` or `bf16`).

    Raises:
        UsageError: for another name.
    """
    if name not in DTYPES:
        raise UsageError(f"'{name}' is not a dtype", suggestion(name, DTYPES))
    return DTYPES[name]
