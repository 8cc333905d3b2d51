"""The backend `torch`: the model itself, in eager mode; and devices and dtypes by name."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fmg.core.display import counted
from fmg.core.errors import UsageError, suggestion
from fmg.core.machine import peak_rss, reset_peak_rss
from fmg.core.profiling import TEXT_ENCODERS, TRANSFORMER, VAE, StageClock, stage, wall_clock
from fmg.core.prompt import CutsPrompts
from fmg.core.protocols import Drawn, FlowMap, Model, NoiseSource
from fmg.core.specs import MapSpec
from fmg.core.types import Conditioning
from fmg.flow.sampling import native_sample

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The torch device called `name`; `auto` is CUDA if available, else the CPU.

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
            f"The device '{name}' does not exist: torch sees {counted(torch.cuda.device_count(), 'CUDA device')}",
            "Use --device cpu, or install a CUDA build of torch on a machine with a GPU.",
        )
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"The device '{name}' is not supported", "Use auto, cpu, cuda or cuda:N.")
    return device


def device_for(name: str, model: str, spec: MapSpec) -> torch.device:
    """The device called `name` for a model; `auto` never means the CPU for a full-size model.

    Raises:
        UsageError: as `pick_device`, or when `auto` finds no GPU for a model that needs one.
    """
    device = pick_device(name)
    if name == "auto" and device.type == "cpu" and spec.gpu_memory_gb:
        raise UsageError(
            f"The model '{model}' needs a GPU with about {spec.gpu_memory_gb:.0f} GB, but torch sees none here",
            f"Use a machine with one (`fmg fetch {model}` downloads the weights there), or --device cpu, which takes"
            " minutes per image.",
        )
    return device


def pick_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name` (`fp32` or `bf16`).

    Raises:
        UsageError: for any other name.
    """
    if name not in DTYPES:
        raise UsageError(f"'{name}' is not a dtype", suggestion(name, DTYPES))
    return DTYPES[name]


@runtime_checkable
class ForgetsText(Protocol):
    """A model whose cache of encoded prompts can be switched off, and whose text encoders can be freed."""

    def text_uncached(self) -> AbstractContextManager[None]:
        """Runs the body with the cache off: every prompt is encoded."""

    def release_text(self) -> None:
        """Frees the memory of the text encoders on the device."""


class TorchBackend:
    """A loaded model with its current adapter. Implements `fmg.core.protocols.Backend`.

    Args:
        model: what is sampled.
        latent_shape: (c, h, w) of one latent; None takes the model's own.
    """

    name = "torch"

    def __init__(self, model: Model, *, latent_shape: tuple[int, int, int] | None = None) -> None:
        self.model = model
        self._latent_shape = latent_shape

    @property
    def detail(self) -> str:
        """`eager`, and the threads of a CPU."""
        return f"eager, {counted(torch.get_num_threads(), 'thread')}" if self._device.type == "cpu" else "eager"

    @property
    def spec(self) -> MapSpec:
        return self.model.spec

    @property
    def flow_map(self) -> FlowMap:
        return self.model.flow_map

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        channels, height, width = self._latent_shape or self.model.latent_shape
        return channels, height, width

    @property
    def device(self) -> str:
        return str(self._device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        with stage(TEXT_ENCODERS):
            return self.model.encode(prompts)

    def cut_prompts(self, prompts: Sequence[str]) -> str:
        """The warning about prompts that the model truncates; empty for none."""
        return self.model.cut_prompts(prompts) if isinstance(self.model, CutsPrompts) else ""

    @torch.no_grad()
    def draw(self, cond: Conditioning, noise: NoiseSource, times: Sequence[float]) -> Drawn:
        """One image for each row of `cond`."""

        def on_device(step: int) -> Tensor:
            return torch.from_numpy(noise(step)).to(self._device)

        start = on_device(0)
        with stage(TRANSFORMER):
            latents = native_sample(self.flow_map, cond, start, times, lambda interval: on_device(interval + 1))
        with stage(VAE):
            images = self.model.decode(latents)
            return Drawn(images.cpu().numpy(), latents.cpu().numpy())

    def uncached(self) -> AbstractContextManager[None]:
        """Runs the body with the cache off, if the model supports it."""
        return self.model.text_uncached() if isinstance(self.model, ForgetsText) else nullcontext()

    def release_text(self) -> None:
        """Frees the text encoders, if the model supports it."""
        if isinstance(self.model, ForgetsText):
            self.model.release_text()

    def clock(self) -> StageClock[Any]:
        """Wall-clock time on a CPU, CUDA events on a GPU."""
        return wall_clock() if self._device.type == "cpu" else cuda_clock(self._device)

    def reset_peak_memory(self) -> None:
        if self._device.type == "cpu":
            reset_peak_rss()
        else:
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak_memory(self) -> int:
        """The peak of the device's allocator, or of the process on a CPU."""
        return peak_rss() if self._device.type == "cpu" else torch.cuda.max_memory_allocated(self._device)

    def __enter__(self) -> TorchBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @property
    def _device(self) -> torch.device:
        return self.model.device


def cuda_clock(device: torch.device) -> StageClock[Any]:
    """A clock of CUDA events on the current stream of `device`; nothing waits until the times are read."""

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def milliseconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end))

    return StageClock(mark, milliseconds)
