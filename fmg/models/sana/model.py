"""SANA-Sprint as a model: Gemma under the authors' instruction before its prompts, and its call signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel
from torch import Tensor
from transformers import Gemma2Model, GemmaTokenizer

from fmg.core.errors import CheckpointError
from fmg.core.hub import locate
from fmg.core.prompt import MASK, PromptForm
from fmg.core.types import Conditioning
from fmg.models.common.model import AdaptedModel
from fmg.models.common.network import LatentNetwork
from fmg.models.common.pipeline_parts import Components, Family, check_same, load_components, square_latent
from fmg.models.common.text import TokenisedText

if TYPE_CHECKING:
    from fmg.models.sana.configs import SanaSprintConfig


@dataclass(frozen=True)
class SanaText(TokenisedText):
    """Gemma 2 with its tokenizer, which pads on the right.

    Attributes:
        tokenizer: tokenizer of Gemma.
        text_encoder: the decoder without its head.
        instruction: text before each prompt; empty for none.
    """

    tokenizer: Any
    text_encoder: Gemma2Model
    instruction: str

    @property
    def encoders(self) -> tuple[Gemma2Model]:
        """Gemma."""
        return (self.text_encoder,)

    @property
    def form(self) -> PromptForm:
        """The prompt in lower case after the instruction."""
        return PromptForm(prefix=self.instruction, lower=True, strip=True)

    def tokenise(self, prompts: list[str], length: int) -> Mapping[str, Tensor]:
        """Ids and mask, with the instruction."""
        texts = [self.form(prompt) for prompt in prompts]
        total = length + self._extra()
        encoded = self.tokenizer(texts, padding="max_length", max_length=total, truncation=True, return_tensors="pt")
        return {"tokenizer": encoded.input_ids, f"tokenizer{MASK}": encoded.attention_mask}

    def states(self, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`tokens` (b, length, d) and their `mask` (b, length), 1 for text and 0 for padding.

        As `SanaSprintPipeline.encode_prompt`: of all states the first and the last `length - 1`, so that the
        instruction influences the states but is not itself among them.
        """
        ids, mask = tokens["tokenizer"], tokens[f"tokenizer{MASK}"]
        states: Tensor = self.text_encoder(ids, attention_mask=mask)[0]
        last = 1 - (ids.shape[1] - self._extra())
        return {name: torch.cat([x[:, :1], x[:, last:]], dim=1) for name, x in (("tokens", states), ("mask", mask))}

    def count(self, prompt: str) -> int:
        """Tokens of Gemma without those of the instruction."""
        return len(self.tokenizer.encode(self.form(prompt), verbose=False)) - self._extra()

    @property
    def facts(self) -> tuple[str, ...]:
        return (self.instruction,)

    def _extra(self) -> int:
        """Tokens that the instruction adds to a prompt, as `SanaSprintPipeline` counts them."""
        return len(self.tokenizer.encode(self.instruction)) - 2 if self.instruction else 0


def published_instruction() -> str:
    """The default instruction that the installed `SanaSprintPipeline` puts before a prompt."""
    lines = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


SANA = Family(
    "SANA",
    MappingProxyType(
        {
            "transformer": {"SanaTransformer2DModel": SanaTransformer2DModel},
            "vae": {"AutoencoderDC": AutoencoderDC},
            "text_encoder": {"Gemma2Model": Gemma2Model},
        }
    ),
    MappingProxyType({"tokenizer": GemmaTokenizer}),
)


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
    """A SANA-Sprint model. Latents have unit variance, as `latents / sigma_data` in diffusers' pipeline."""

    pipeline: ClassVar[Any] = SanaSprintPipeline
    network_class: ClassVar[type[LatentNetwork]] = SanaNetwork
    text_folders: ClassVar[tuple[str, ...]] = SANA.text_folders

    @classmethod
    def read(
        cls, config: SanaSprintConfig, device: torch.device, dtype: torch.dtype, text_device: torch.device
    ) -> Components[SanaText]:
        folder = locate(config.architecture(), "model", config.registered_name).path
        text = partial(SanaText, instruction=published_instruction() if config.instruction else "")
        parts = load_components(SANA, folder, config.conventions(), None, text, device, dtype, text_device)
        parts.text.tokenizer.padding_side = "right"
        _check_fit(parts)
        return parts

    @staticmethod
    def latent_shape_of(components: Components[SanaText]) -> tuple[int, int, int]:
        """(c, h, w) of one latent, by the rule of `SanaSprintPipeline`."""
        vae, token = components.vae.config, components.transformer.config.patch_size
        scale = 2 ** (len(vae.encoder_block_out_channels) - 1)
        return square_latent(components, vae.latent_channels, scale, token)


def _check_fit(components: Components[SanaText]) -> None:
    transformer, text, vae = components.transformer.config, components.text.text_encoder, components.vae.config
    check_same("vae", "latent_channels", vae.latent_channels, "in_channels", transformer.in_channels)
    check_same("text_encoder", "hidden_size", text.config.hidden_size, "caption_channels", transformer.caption_channels)
    if not transformer.guidance_embeds:
        raise CheckpointError(
            f"The transformer in {components.folder} embeds no guidance scale, unlike every SANA-Sprint",
            "Give a SANA-Sprint folder; SANA without Sprint is not a few-step flow map.",
        )
