"""SD3 flow maps as models: a transformer that adapters turn into a flow map, and three text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

# diffusers looks for this base class in a component's module to decide how to load it
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from fmg.core.errors import CheckpointError
from fmg.core.hub import locate
from fmg.core.model_folder import read_config
from fmg.core.types import Conditioning
from fmg.models.common.model import AdaptedModel
from fmg.models.common.network import LatentNetwork
from fmg.models.common.pipeline_parts import Components, Family, check_same, checked_times, load_components
from fmg.models.common.stacked_adapters import load_merged
from fmg.models.common.text import TokenisedText, Tokenizer, token_ids
from fmg.models.common.two_times import TwoTimeMixin
from fmg.models.common.weights import WeightFiles
from fmg.models.published import located_adapters
from fmg.models.sd3.size import SECOND_EMBEDDER

if TYPE_CHECKING:
    from fmg.models.sd3.configs import SD35MeanFlowConfig


class FlowMapSD3Transformer2DModel(TwoTimeMixin, SD3Transformer2DModel):  # type: ignore[misc]
    """``SD3Transformer2DModel`` whose forward takes the two times ``t`` and ``s`` of a flow map (`TwoTimeMixin`).

    The state dict has the stock names, plus ``time_text_embed.delta_embedder.linear_{1,2}`` of a two-time map. With
    AnyFlow's gate g, the time embedding is
    ``(1 - g) timestep_embedder(c t) + g delta_embedder(c s) + text_embedder(pooled)`` with ``c = time_scale``, as in
    MeanFlowNFT.
    """

    second_embedder: ClassVar[str] = SECOND_EMBEDDER


@dataclass(frozen=True)
class SD3Text(TokenisedText):
    """The three text encoders of SD3 with their tokenizers: CLIP ViT-L/14, OpenCLIP ViT-bigG/14 and T5.

    T5 gets no attention mask and sees its padding. All truncate prompts that are too long for them.
    """

    tokenizer: Tokenizer
    text_encoder: CLIPTextModelWithProjection
    tokenizer_2: Tokenizer
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer_3: Tokenizer
    text_encoder_3: T5EncoderModel

    @property
    def encoders(self) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel]:
        """CLIP-L, CLIP-G and T5."""
        return self.text_encoder, self.text_encoder_2, self.text_encoder_3

    def tokenise(self, prompts: list[str], length: int) -> Mapping[str, Tensor]:
        """Ids for both CLIPs and T5."""
        # the pipeline takes the length of the first tokenizer for both
        clip_length = self.tokenizer.model_max_length
        return {
            "tokenizer": token_ids(self.tokenizer, prompts, clip_length),
            "tokenizer_2": token_ids(self.tokenizer_2, prompts, clip_length),
            "tokenizer_3": token_ids(self.tokenizer_3, prompts, length),
        }

    def states(self, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`tokens` (b, 77 + length, d) and `pooled` (b, p), as `StableDiffusion3Pipeline.encode_prompt` makes them.

        The penultimate hidden states of both CLIPs, concatenated and padded to the width of T5, then the states of T5.
        """
        states, pooled = [], []
        for name, encoder in (("tokenizer", self.text_encoder), ("tokenizer_2", self.text_encoder_2)):
            encoded = encoder(tokens[name], output_hidden_states=True)
            states.append(encoded.hidden_states[-2])
            pooled.append(encoded[0])
        t5: Tensor = self.text_encoder_3(tokens["tokenizer_3"])[0]
        clip = torch.cat(states, dim=-1)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {"tokens": torch.cat([clip, t5], dim=-2), "pooled": torch.cat(pooled, dim=-1)}

    def count(self, prompt: str) -> int:
        """Tokens of T5, including its end token; the CLIPs only ever see the beginning of a prompt."""
        return len(self.tokenizer_3.encode(prompt, verbose=False))


SD3 = Family(
    "SD3",
    MappingProxyType(
        {
            "transformer": {
                "FlowMapSD3Transformer2DModel": FlowMapSD3Transformer2DModel,
                # the published folder; the conventions and the adapters complete it
                "SD3Transformer2DModel": FlowMapSD3Transformer2DModel,
            },
            "vae": {"AutoencoderKL": AutoencoderKL},
            "text_encoder": {"CLIPTextModelWithProjection": CLIPTextModelWithProjection},
            "text_encoder_2": {"CLIPTextModelWithProjection": CLIPTextModelWithProjection},
            "text_encoder_3": {"T5EncoderModel": T5EncoderModel},
        }
    ),
    MappingProxyType({"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5Tokenizer}),
)


class SD3Network(LatentNetwork):
    """A `FlowMapSD3Transformer2DModel`."""

    def _call(self, x: Tensor, t: Tensor, s: Tensor | None, cond: Conditioning) -> Tensor:
        output: Tensor = self._transformer(
            hidden_states=x.to(self._dtype),
            encoder_hidden_states=cond.tensors["tokens"].to(self._dtype),
            pooled_projections=cond.tensors["pooled"],
            timestep=t,
            second=s,
            return_dict=False,
        )[0]
        return output


class SD3Model(AdaptedModel[SD3Text]):
    """An SD3 flow map."""

    pipeline: ClassVar[Any] = StableDiffusion3Pipeline
    network_class: ClassVar[type[LatentNetwork]] = SD3Network
    text_folders: ClassVar[tuple[str, ...]] = SD3.text_folders
    second_embedder: ClassVar[str | None] = FlowMapSD3Transformer2DModel.second_embedder

    @classmethod
    def read(
        cls, config: SD35MeanFlowConfig, device: torch.device, dtype: torch.dtype, text_device: torch.device
    ) -> Components[SD3Text]:
        folder = locate(config.architecture(), "model", config.registered_name).path
        conventions, own = config.conventions(), folder / "transformer"

        def transformer() -> tuple[FlowMapSD3Transformer2DModel, WeightFiles]:
            SD3.class_of(own, own.name)
            stated = read_config(own)
            stated |= checked_times(own, stated, conventions)
            return load_merged(FlowMapSD3Transformer2DModel, stated, own, located_adapters(config), device, dtype)

        parts = load_components(SD3, folder, conventions, transformer, SD3Text, device, dtype, text_device)
        _check_fit(parts)
        return parts


def _check_fit(components: Components[SD3Text]) -> None:
    """Refuses components that load one by one but do not fit, with a `CheckpointError`."""
    transformer, text, vae = components.transformer.config, components.text, components.vae.config
    check_same("vae", "latent_channels", vae.latent_channels, "in_channels", transformer.in_channels)
    t5, clips = text.text_encoder_3.config, (text.text_encoder.config, text.text_encoder_2.config)
    check_same("text_encoder_3", "d_model", t5.d_model, "joint_attention_dim", transformer.joint_attention_dim)
    pooled, wanted = sum(int(clip.projection_dim or 0) for clip in clips), transformer.pooled_projection_dim
    check_same("text_encoder and text_encoder_2", "projection_dim", pooled, "pooled_projection_dim", wanted)
    width = transformer.num_attention_heads * transformer.attention_head_dim
    check_same("transformer", "caption_projection_dim", transformer.caption_projection_dim, "its width", width)
    side = components.conventions.resolution // 2 ** (len(vae.block_out_channels) - 1) // transformer.patch_size
    if side > transformer.pos_embed_max_size:
        raise CheckpointError(
            f"The transformer in {components.folder} has positions for {transformer.pos_embed_max_size} tokens along"
            f" a side, but {components.conventions.resolution} px are {side}",
            "Set a smaller model.resolution.",
        )
