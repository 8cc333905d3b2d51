"""Reads a diffusers folder of SANA-Sprint: stock classes, local files, safetensors, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import Gemma2Model, GemmaTokenizer

from fmg.core.errors import CheckpointError
from fmg.core.model_folder import read_config
from fmg.models.common.loading import Family, check_same, load_tokenizer, quiet
from fmg.models.common.weights import WeightFiles, folder_weights, load_transformer
from fmg.models.conventions import FlowMapConventions
from fmg.models.sana.encoders import SanaText

SANA = Family(
    "SANA",
    MappingProxyType(
        {
            "transformer": {"SanaTransformer2DModel": SanaTransformer2DModel},
            "vae": {"AutoencoderDC": AutoencoderDC},
            "text_encoder": {"Gemma2Model": Gemma2Model},
        }
    ),
)


@dataclass(frozen=True)
class SanaComponents:
    """The parts of a loaded folder, in evaluation mode and without gradients."""

    folder: Path
    conventions: FlowMapConventions
    transformer: SanaTransformer2DModel
    vae: AutoencoderDC
    text: SanaText
    weights: WeightFiles


def load_parts(
    folder: Path,
    conventions: FlowMapConventions,
    device: torch.device,
    dtype: torch.dtype,
    *,
    instruction: str = "",
    text_device: torch.device | None = None,
) -> SanaComponents:
    """Loads a pipeline folder by stated conventions.

    Args:
        folder: a diffusers pipeline folder.
        conventions: how the transformer's weights want to be sampled.
        device: where transformer and decoder go.
        dtype: of every weight.
        instruction: text that Gemma reads before each prompt.
        text_device: where Gemma goes; None: to `device`.

    Raises:
        CheckpointError: a file is missing, damaged, of a class that is not known, or does not fit the others.
    """
    with quiet():
        own = folder / "transformer"
        SANA.class_of(own, own.name)
        weights = folder_weights(own)
        transformer = load_transformer(SanaTransformer2DModel, read_config(own), weights, device, dtype)
        vae = SANA.module(folder / "vae", dtype)
        text_encoder = SANA.module(folder / "text_encoder", dtype)
        tokenizer = load_tokenizer(folder / "tokenizer", GemmaTokenizer)
    tokenizer.padding_side = "right"
    for module in (transformer, vae, text_encoder):
        module.eval().requires_grad_(False)
    vae.to(device, memory_format=torch.channels_last)
    text_encoder.to(device if text_device is None else text_device)
    text = SanaText(tokenizer, text_encoder, instruction)
    components = SanaComponents(folder, conventions, transformer, vae, text, weights)
    _check_fit(components)
    return components


def _check_fit(components: SanaComponents) -> None:
    transformer, text, vae = components.transformer.config, components.text.text_encoder, components.vae.config
    check_same("vae", "latent_channels", vae.latent_channels, "in_channels", transformer.in_channels)
    check_same("text_encoder", "hidden_size", text.config.hidden_size, "caption_channels", transformer.caption_channels)
    if not transformer.guidance_embeds:
        raise CheckpointError(
            f"The transformer in {components.folder} embeds no guidance scale, as every SANA-Sprint does",
            "Give a SANA-Sprint folder; SANA without Sprint is no few-step flow map.",
        )
