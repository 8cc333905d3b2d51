"""AuraFlow: its text encoder, how its transformer is called, and what reads a saved LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL
from torch import Tensor
from transformers import LlamaTokenizer, UMT5EncoderModel

from fmg.core.hub import locate
from fmg.core.types import Conditioning
from fmg.models.common.model import AdaptedModel
from fmg.models.common.network import LatentNetwork
from fmg.models.common.pipeline_parts import Components, Family, check_same, load_components, square_latent
from fmg.models.common.text import TokenisedText

if TYPE_CHECKING:
    from fmg_auraflow.configs import AuraFlowConfig

# nothing but these classes is ever made, so no code of a folder runs
FAMILY = Family(
    "AuraFlow",
    MappingProxyType(
        {
            "transformer": {"AuraFlowTransformer2DModel": AuraFlowTransformer2DModel},
            "vae": {"AutoencoderKL": AutoencoderKL},
            "text_encoder": {"UMT5EncoderModel": UMT5EncoderModel},
        }
    ),
    MappingProxyType({"tokenizer": LlamaTokenizer}),
)


@dataclass(frozen=True)
class AuraFlowText(TokenisedText):
    """UMT5 with its tokenizer; states of the padding are zero, as in `AuraFlowPipeline`."""

    tokenizer: Any
    text_encoder: UMT5EncoderModel

    @property
    def encoders(self) -> tuple[UMT5EncoderModel]:
        return (self.text_encoder,)

    def tokenise(self, prompts: list[str], length: int) -> Mapping[str, Tensor]:
        """Ids and mask."""
        encoded = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return {"tokenizer": encoded.input_ids, "tokenizer_mask": encoded.attention_mask}

    def states(self, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`tokens` (b, length, d)."""
        mask = tokens["tokenizer_mask"]
        states: Tensor = self.text_encoder(tokens["tokenizer"], attention_mask=mask)[0]
        return {"tokens": states * mask[..., None]}

    def count(self, prompt: str) -> int:
        """Tokens of a prompt."""
        return len(self.tokenizer.encode(prompt))


class AuraFlowNetwork(LatentNetwork):
    """An `AuraFlowTransformer2DModel`, which takes times in [0, 1] and gives the velocity."""

    def _call(self, x: Tensor, t: Tensor, s: Tensor | None, cond: Conditioning) -> Tensor:
        output: Tensor = self._transformer(
            hidden_states=x.to(self._dtype),
            encoder_hidden_states=cond.tensors["tokens"].to(self._dtype),
            timestep=t,
            return_dict=False,
        )[0]
        return output


class AuraFlowModel(AdaptedModel[AuraFlowText]):
    """An AuraFlow model."""

    pipeline: ClassVar[Any] = AuraFlowPipeline
    network_class: ClassVar[type[LatentNetwork]] = AuraFlowNetwork
    text_folders: ClassVar[tuple[str, ...]] = FAMILY.text_folders

    @classmethod
    def read(
        cls, config: AuraFlowConfig, device: torch.device, dtype: torch.dtype, text_device: torch.device
    ) -> Components[AuraFlowText]:
        """The parts that `config` describes, from files on this computer."""
        folder = locate(config.architecture(), "model", config.registered_name).path
        parts = load_components(FAMILY, folder, config.conventions(), None, AuraFlowText, device, dtype, text_device)
        text, network = parts.text.text_encoder.config, parts.transformer.config
        check_same("text_encoder", "d_model", text.d_model, "joint_attention_dim", network.joint_attention_dim)
        check_same("vae", "latent_channels", parts.vae.config.latent_channels, "in_channels", network.in_channels)
        return parts

    @staticmethod
    def latent_shape_of(components: Components[AuraFlowText]) -> tuple[int, int, int]:
        """(c, h, w) of one latent, by the rule of `AuraFlowPipeline`."""
        vae, token = components.vae.config, components.transformer.config.patch_size
        return square_latent(components, vae.latent_channels, 2 ** (len(vae.block_out_channels) - 1), token)
