"""The SANA transformer as a plain function of latents, time and conditioning, as a flow map takes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import SanaSprintPipeline
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CheckpointError
from fmg.core.hub import locate
from fmg.core.protocols import FlowMap
from fmg.core.types import Conditioning
from fmg.flow import TrigFlowMap
from fmg.models.common.model import AdaptedModel, Network
from fmg.models.common.policy_weights import Scope
from fmg.models.common.text import TextEncoders, cached_encoders
from fmg.models.sana.loading import SanaComponents, load_parts, published_instruction

if TYPE_CHECKING:
    from fmg.models.sana.configs import SanaSprintConfig

ENCODER_FOLDERS = ("text_encoder", "tokenizer")


class SanaNetwork:
    """`net(z, s, cond)`: the velocity in rectified-flow coordinates, on latents (b, c, h, w).

    Latents enter in the transformer's dtype and leave in fp32; time and guidance stay fp32 to their sinusoids. The
    transformer is called as a module, so that the hooks of DDP, FSDP2 and PEFT fire.

    Args:
        transformer: a `SanaTransformer2DModel` with an embedded guidance scale, or a wrapper with its call signature.
        dtype: dtype of the latents that the transformer takes.
        guidance: guidance scale, already multiplied by the `guidance_embeds_scale` of the weights.
        scope: the context that every call of the transformer runs in.
    """

    def __init__(
        self,
        transformer: Callable[..., Any],
        dtype: torch.dtype,
        guidance: float,
        scope: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._transformer = transformer
        self._dtype = dtype
        self._guidance = guidance
        self._scope = scope

    def within(
        self, scope: Callable[[], AbstractContextManager[None]], transformer: Callable[..., Any] | None = None
    ) -> SanaNetwork:
        """The same network with calls in another context, and through `transformer` if given."""
        return SanaNetwork(transformer or self._transformer, self._dtype, self._guidance, scope)

    def __call__(
        self, z: Float[Tensor, "b c h w"], time: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """The velocity at the rectified-flow time `time` in [0, 1]."""
        time = time.float()
        with self._scope():
            output: Tensor = self._transformer(
                hidden_states=z.to(self._dtype),
                encoder_hidden_states=cond.tensors["tokens"].to(self._dtype),
                encoder_attention_mask=cond.tensors["mask"],
                timestep=time,
                guidance=torch.full_like(time, self._guidance),
                return_dict=False,
            )[0]
        return output.float()


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
            f"Use a multiple of {token}.",
        )
    return components.vae.config.latent_channels, resolution // scale, resolution // scale
