"""A loaded FLUX-class flow map."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline

from fmg.core.errors import CheckpointError
from fmg.core.protocols import FlowMap
from fmg.flow import SingleTimeMap, TwoTimeMap, path_by_name
from fmg.models.common.model import AdaptedModel, Network
from fmg.models.common.scopes import Scope
from fmg.models.common.text import TextEncoders
from fmg.models.conventions import FlowMapConventions
from fmg.models.flux.latents import PATCH
from fmg.models.flux.loading import FluxComponents, load_folder
from fmg.models.flux.network import FluxNetwork


class FluxModel(AdaptedModel[FluxComponents]):
    """A FLUX-class model. Packing of latents into tokens happens inside.

    Args:
        components: a loaded folder.
        name: registered name of the model, written into saved adapters.
        text: encoder of prompts; None takes the folder's own, beside the transformer.
    """

    pipeline: ClassVar[Any] = FluxPipeline
    alpha_tensors: ClassVar[bool] = True
    second_time_embedder: ClassVar[str | None] = "timestep_embedder2"

    def __init__(self, components: FluxComponents, name: str, *, text: TextEncoders | None = None) -> None:
        transformer = components.transformer
        self._network = FluxNetwork(transformer, transformer.dtype, components.conventions.guidance)
        super().__init__(components, name, _latent_shape(components), text=text)

    @classmethod
    def from_folder(cls, folder: Path, device: torch.device, dtype: torch.dtype, name: str) -> FluxModel:
        """Loads a diffusers folder with its `fmg_flow_map.json`.

        Raises:
            CheckpointError: a file of the folder is missing, damaged or of another kind.
        """
        return cls(load_folder(folder, device, dtype), name)

    def _map(self, scope: Scope, network: Network | None = None) -> FlowMap:
        return flux_map(self._network.within(scope, network), self.components.conventions)

    def _with_transformer(self, transformer: Any) -> FluxModel:
        return FluxModel(replace(self.components, transformer=transformer), self._name)


def flux_map(network: FluxNetwork, conventions: FlowMapConventions) -> FlowMap:
    """The flow map that a network is by its conventions."""
    path = path_by_name(conventions.path)
    if conventions.map == "two-time":
        return TwoTimeMap(network.two_time, path)
    return SingleTimeMap(network.single_time, path)


def _latent_shape(components: FluxComponents) -> tuple[int, int, int]:
    # the rule by which FluxPipeline finds the latent size
    scale = 2 ** (len(components.vae.config.block_out_channels) - 1)
    resolution = components.conventions.resolution
    if resolution % (scale * PATCH):
        raise CheckpointError(
            f"The resolution {resolution} is not a multiple of {scale * PATCH}, the side of a token in pixels",
            "Use a resolution that is.",
        )
    return components.vae.config.latent_channels, resolution // scale, resolution // scale
