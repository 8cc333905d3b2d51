"""The backend `torch`: the model itself, eager, in the dtype it was loaded in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fmg.core.backends import CutsPrompts, Drawn, NoiseSource
from fmg.core.display import counted
from fmg.core.machine import peak_rss, reset_peak_rss
from fmg.core.profiling import TEXT_ENCODERS, TRANSFORMER, VAE, StageClock, stage, wall_clock
from fmg.core.protocols import FlowMap, Model
from fmg.core.specs import MapSpec
from fmg.core.types import Conditioning
from fmg.flow.sampling import native_sample


@runtime_checkable
class ForgetsText(Protocol):
    """A model whose memory of encoded prompts can be switched off, and whose text encoders can be freed."""

    def text_uncached(self) -> AbstractContextManager[None]:
        """Inside, every prompt is encoded."""

    def release_text(self) -> None:
        """Frees the memory of the text encoders on the device."""


class TorchBackend:
    """A loaded model with the adapter as it is set on it. Implements `fmg.core.backends.Backend`.

    Args:
        model: what draws.
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
        """Kind of map and sampling conventions."""
        return self.model.spec

    @property
    def flow_map(self) -> FlowMap:
        """The map with the adapter as it is set on the model."""
        return self.model.flow_map

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent."""
        channels, height, width = self._latent_shape or self.model.latent_shape
        return channels, height, width

    @property
    def device(self) -> str:
        """Where latents live."""
        return str(self._device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompt embeddings."""
        with stage(TEXT_ENCODERS):
            return self.model.encode(prompts)

    def cut_prompts(self, prompts: Sequence[str]) -> str:
        """What to say of prompts that the model does not read to their end; empty for none."""
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
        """Inside, every prompt is encoded, by a model that can be told to."""
        return self.model.text_uncached() if isinstance(self.model, ForgetsText) else nullcontext()

    def release_text(self) -> None:
        """Frees the text encoders of a model that can do without."""
        if isinstance(self.model, ForgetsText):
            self.model.release_text()

    def clock(self) -> StageClock[Any]:
        """Wall time on a CPU, CUDA events on a GPU."""
        if self._device.type == "cpu":
            return wall_clock()
        return cuda_clock(self._device)

    def reset_peak_memory(self) -> None:
        """Of the device's allocator, or of the process."""
        if self._device.type == "cpu":
            reset_peak_rss()
        else:
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak_memory(self) -> int:
        """Of the device's allocator, or of the process."""
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
    """A clock of CUDA events on the current stream of `device`: nothing waits until the times are asked for."""

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def milliseconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end))

    return StageClock(mark, milliseconds)
