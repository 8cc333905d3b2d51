"""A loaded SANA-Sprint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import SanaSprintPipeline

from fmg.core.errors import CheckpointError
from fmg.core.hub import locate
from fmg.core.protocols import FlowMap
from fmg.flow import TrigFlowMap
from fmg.models.common.model import AdaptedModel, Network
from fmg.models.common.scopes import Scope
from fmg.models.common.text import TextEncoders, cached_encoders
from fmg.models.sana.encoders import published_instruction
from fmg.models.sana.loading import SanaComponents, load_parts
from fmg.models.sana.network import SanaNetwork
from fmg.models.sana_configs import SanaSprintConfig

ENCODER_FOLDERS = ("text_encoder", "tokenizer")


class SanaModel(AdaptedModel[SanaComponents]):
    """A SANA-Sprint model. Latents have unit variance, as `latents / sigma_data` in diffusers' pipeline.

    Args:
        components: a loaded folder.
        name: registered name of the model, written into saved adapters.
        text: encoder of prompts; None takes the folder's own, beside the transformer.
    """

    pipeline: ClassVar[Any] = SanaSprintPipeline

    def __init__(self, components: SanaComponents, name: str, *, text: TextEncoders | None = None) -> None:
        transformer, guidance = components.transformer, components.conventions.guidance
        assert guidance is not None
        scaled = guidance * transformer.config.guidance_embeds_scale
        self._network = SanaNetwork(transformer, transformer.dtype, scaled)
        super().__init__(components, name, _latent_shape(components), text=text)

    @classmethod
    def from_config(cls, config: SanaSprintConfig, device: torch.device, dtype: torch.dtype) -> SanaModel:
        """The model that `config` describes, from files on this computer; errors as `PublishedConfig.load`."""
        name = config.recipe or ""
        instruction = published_instruction() if config.instruction else ""
        components = load_parts(
            locate(config.architecture(), "model", name).path,
            config.conventions(),
            device,
            dtype,
            instruction=instruction,
            text_device=device if config.text_device == "model" else torch.device("cpu"),
        )
        if config.gradient_checkpointing:
            components.transformer.enable_gradient_checkpointing()
        text = cached_encoders(
            components.text,
            components.folder,
            ENCODER_FOLDERS,
            config.max_sequence_length,
            device,
            place=config.text_device,
            cache=config.text_cache,
            facts=(instruction,),
        )
        return cls(components, name, text=text)

    def _map(self, scope: Scope, network: Network | None = None) -> FlowMap:
        return TrigFlowMap(self._network.within(scope, network))

    def _with_transformer(self, transformer: Any) -> SanaModel:
        return SanaModel(replace(self.components, transformer=transformer), self._name)


def _latent_shape(components: SanaComponents) -> tuple[int, int, int]:
    # the rule by which SanaSprintPipeline finds the latent size
    scale = 2 ** (len(components.vae.config.encoder_block_out_channels) - 1)
    token = scale * components.transformer.config.patch_size
    resolution = components.conventions.resolution
    if resolution % token:
        raise CheckpointError(
            f"The resolution {resolution} is not a multiple of {token}, the side of a token in pixels",
            "Use a resolution that is.",
        )
    return components.vae.config.latent_channels, resolution // scale, resolution // scale
