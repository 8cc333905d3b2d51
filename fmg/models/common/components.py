"""What a loaded pipeline folder of any family consists of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypeVar

from fmg.models.common.text import TextStack
from fmg.models.common.weights import WeightFiles
from fmg.models.conventions import FlowMapConventions


class Components(Protocol):
    """The parts of a loaded pipeline folder, in evaluation mode and without gradients."""

    @property
    def folder(self) -> Path:
        """Where they were read."""

    @property
    def conventions(self) -> FlowMapConventions:
        """How the weights want to be sampled."""

    @property
    def transformer(self) -> Any:
        """The diffusers transformer."""

    @property
    def vae(self) -> Any:
        """The diffusers autoencoder."""

    @property
    def text(self) -> TextStack:
        """Text encoders and tokenizers."""

    @property
    def weights(self) -> WeightFiles:
        """The files of the transformer."""


C = TypeVar("C", bound=Components)
