"""A loaded FLUX-class flow map."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline

from fmg.core.errors import CheckpointError, FmgWarning, MissingDependencyError
from fmg.core.hub import locate
from fmg.core.protocols import FlowMap
from fmg.flow import SingleTimeMap, TwoTimeMap, path_by_name
from fmg.models.common.model import AdaptedModel, Network
from fmg.models.common.scopes import Scope
from fmg.models.common.text import TextEncoders, cached_encoders
from fmg.models.conventions import FlowMapConventions
from fmg.models.flux.latents import PATCH
from fmg.models.flux.loading import FluxComponents, load_folder, load_parts
from fmg.models.flux.network import FluxNetwork
from fmg.models.flux.probe import time_scale_doubt
from fmg.models.flux_configs import FluxConfig, FluxStudentConfig

ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


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

    @classmethod
    def from_config(cls, config: FluxConfig, device: torch.device, dtype: torch.dtype) -> FluxModel:
        """The model that `config` describes, from files on this computer; errors as `PublishedConfig.load`.

        Warns when the weights do not fit the stated time scale.
        """
        name = config.recipe or ""
        student = locate(config.assets()[0], "model", name).path if isinstance(config, FluxStudentConfig) else None
        components = load_parts(
            locate(config.architecture(), "model", name).path,
            config.conventions(),
            device,
            dtype,
            student=student,
            text_device=device if config.text_device == "model" else torch.device("cpu"),
        )
        transformer = components.transformer
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        _set_attention(transformer, config.attention)
        _set_decoding(components.vae, config)
        doubt = time_scale_doubt(transformer.time_text_embed.timestep_embedder, config.time_scale)
        if doubt is not None:
            warnings.warn(f"'{name}': {doubt}", FmgWarning, stacklevel=2)
        text = cached_encoders(
            components.text,
            components.folder,
            ENCODER_FOLDERS,
            config.max_sequence_length,
            device,
            place=config.text_device,
            cache=config.text_cache,
        )
        return cls(components, name, text=text)

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


def _set_decoding(vae: Any, config: FluxConfig) -> None:
    if config.vae_slicing:
        vae.enable_slicing()
    if config.vae_tile is not None:
        vae.enable_tiling()
        # the class takes the size of its tiles from its training images, which are as large as those that it decodes
        vae.tile_sample_min_size = config.vae_tile
        vae.tile_latent_min_size = config.vae_tile // 2 ** (len(vae.config.block_out_channels) - 1)


def _set_attention(transformer: Any, backend: str) -> None:
    if backend == "native":
        return
    try:
        transformer.set_attention_backend(backend)
    except (RuntimeError, ImportError, ValueError) as error:
        raise MissingDependencyError(
            f"The attention backend '{backend}' cannot be used: {' '.join(str(error).split())[:200]}",
            "Install what it needs, or set model.attention to native.",
        ) from error
