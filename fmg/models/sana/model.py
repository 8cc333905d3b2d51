"""SANA-Sprint as a model: its call signature and the instruction before its prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import SanaSprintPipeline
from torch import Tensor

from fmg.core.hub import locate
from fmg.core.types import Conditioning
from fmg.models.common.model import AdaptedModel
from fmg.models.common.network import LatentNetwork
from fmg.models.common.pipeline_parts import square_latent
from fmg.models.sana.loading import SANA, SanaComponents, SanaText, load_parts, published_instruction

if TYPE_CHECKING:
    from fmg.models.sana.configs import SanaSprintConfig


class SanaNetwork(LatentNetwork):
    """A `SanaTransformer2DModel`: the velocity in rectified-flow coordinates at the rectified-flow time."""

    def _call(self, x: Tensor, t: Tensor, s: Tensor | None, cond: Conditioning) -> Tensor:
        output: Tensor = self._transformer(
            hidden_states=x.to(self._dtype),
            encoder_hidden_states=cond.tensors["tokens"].to(self._dtype),
            encoder_attention_mask=cond.tensors["mask"],
            timestep=t,
            guidance=self._guidances(t),
            return_dict=False,
        )[0]
        return output


class SanaModel(AdaptedModel[SanaText]):
    """A SANA-Sprint model. Latents have unit variance, as `latents / sigma_data` in diffusers' pipeline.

    Args:
        components: a loaded folder.
        name: registered name of the model, written into saved adapters.
        text: encoder of prompts; None takes the folder's own, beside the transformer.
    """

    pipeline: ClassVar[Any] = SanaSprintPipeline
    network_class: ClassVar[type[LatentNetwork]] = SanaNetwork
    text_folders: ClassVar[tuple[str, ...]] = SANA.text_folders

    @classmethod
    def read(
        cls, config: SanaSprintConfig, device: torch.device, dtype: torch.dtype, text_device: torch.device
    ) -> SanaComponents:
        """The parts that `config` describes, from files on this computer."""
        return load_parts(
            locate(config.architecture(), "model", config.registered_name).path,
            config.conventions(),
            device,
            dtype,
            instruction=published_instruction() if config.instruction else "",
            text_device=text_device,
        )

    @staticmethod
    def text_facts(components: SanaComponents) -> tuple[str, ...]:
        """The instruction before each prompt."""
        return (components.text.instruction,)

    @staticmethod
    def latent_shape_of(components: SanaComponents) -> tuple[int, int, int]:
        """(c, h, w) of one latent, by the rule of `SanaSprintPipeline`."""
        vae, token = components.vae.config, components.transformer.config.patch_size
        scale = 2 ** (len(vae.encoder_block_out_channels) - 1)
        return square_latent(components, vae.latent_channels, scale, token)
