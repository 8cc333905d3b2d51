"""What runs the network: torch here; exported artifacts bring their own backends."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.protocols import FlowMap, Model
from fmg.core.specs import MapSpec
from fmg.core.types import Conditioning


class Backend(Protocol):
    """Encoder, flow map and decoder of one model on one runtime. A context manager: leaving it frees the runtime."""

    @property
    def name(self) -> str:
        """Registered name of the runtime, such as `torch`."""

    @property
    def spec(self) -> MapSpec:
        """Kind of map and sampling conventions."""

    @property
    def flow_map(self) -> FlowMap:
        """The map; tensors in and out are torch tensors on `device`."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent."""

    @property
    def device(self) -> torch.device:
        """Where latents live."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompt embeddings."""

    def decode(self, latents: Float[Tensor, "b *shape"]) -> Float[Tensor, "b 3 h w"]:
        """Images in [0, 1]."""

    def synchronize(self) -> None:
        """Waits until queued work is done, so that a clock read after it is honest."""

    def __enter__(self) -> Backend: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class TorchBackend:
    """The model itself, eager, in the dtype it was loaded in."""

    name = "torch"

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def spec(self) -> MapSpec:
        """Kind of map and sampling conventions."""
        return self.model.spec

    @property
    def flow_map(self) -> FlowMap:
        """The map with the adapter as it is set on the model."""
        return self.model.flow_map

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent."""
        return self.model.latent_shape

    @property
    def device(self) -> torch.device:
        """Where latents live."""
        return self.model.device

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompt embeddings."""
        return self.model.encode(prompts)

    def decode(self, latents: Float[Tensor, "b *shape"]) -> Float[Tensor, "b 3 h w"]:
        """Images in [0, 1]."""
        return self.model.decode(latents)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __enter__(self) -> TorchBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
