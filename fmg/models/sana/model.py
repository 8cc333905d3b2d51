"""A loaded SANA-Sprint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from diffusers import SanaSprintPipeline

from fmg.core.errors import CheckpointError
from fmg.core.protocols import FlowMap
from fmg.flow import TrigFlowMap
from fmg.models.common.model import AdaptedModel, Network
from fmg.models.common.scopes import Scope
from fmg.models.common.text import TextEncoders
from fmg.models.sana.loading import SanaComponents
from fmg.models.sana.network import SanaNetwork


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
