"""The parts of a FLUX.2 [klein] folder: Qwen3 as text encoder, and an autoencoder with normalised latents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from fmg.core.errors import CheckpointError
from fmg.core.json_io import JsonError, read_object
from fmg.core.model_folder import read_config
from fmg.models.common.pipeline_parts import Components, Family, check_rotary, check_same, load_components
from fmg.models.common.qwen import QwenText
from fmg.models.conventions import FlowMapConventions
from fmg.models.flux.latents import PATCH

# the defaults of diffusers; an axis for time, row, column and place in the text
_STOCK_AXES: Mapping[str, object] = MappingProxyType({"attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32]})

FLUX2 = Family(
    "FLUX.2 [klein]",
    MappingProxyType(
        {
            "transformer": {"Flux2Transformer2DModel": Flux2Transformer2DModel},
            "vae": {"AutoencoderKLFlux2": AutoencoderKLFlux2},
            "text_encoder": {"Qwen3ForCausalLM": Qwen3ForCausalLM},
        }
    ),
    MappingProxyType({"tokenizer": Qwen2Tokenizer}),
)

Flux2Components = Components[QwenText]
# the states and the template of Flux2KleinPipeline
_text = partial(QwenText, layers=(9, 18, 27), thinking=False)


def load_parts(
    folder: Path,
    conventions: FlowMapConventions,
    device: torch.device,
    dtype: torch.dtype,
    text_device: torch.device | None = None,
) -> Flux2Components:
    """Loads a pipeline folder with given conventions. Arguments and errors as for `load_components`."""
    _check_distilled(folder)
    components = load_components(FLUX2, folder, conventions, None, _text, device, dtype, text_device)
    if components.transformer.config.guidance_embeds:
        raise CheckpointError(
            f"The transformer in {folder} embeds a guidance scale, as that of FLUX.2 [dev] does",
            "Give a folder of FLUX.2 [klein].",
        )
    check_parts(components)
    return components


def check_parts(components: Flux2Components) -> None:
    """Checks that components of FLUX.2 or FLUX.3, which load one by one, belong together.

    Raises:
        CheckpointError: they do not.
    """
    transformer, text, vae = components.transformer.config, components.text, components.vae.config
    own = components.folder / "transformer"
    check_rotary(own, read_config(own), _STOCK_AXES)
    text.check_layers(components.folder / "text_encoder")
    check_same(
        "text_encoder", "width of its hidden states", text.width, "joint_attention_dim", transformer.joint_attention_dim
    )
    channels = PATCH**2 * vae.latent_channels
    check_same("vae", f"latent_channels x {PATCH**2}", channels, "in_channels", transformer.in_channels)
    if tuple(vae.patch_size) != (PATCH, PATCH):
        raise CheckpointError(
            f"The autoencoder in {components.folder} normalises patches of {tuple(vae.patch_size)} latent pixels",
            f"Give a folder with patches of {PATCH} x {PATCH}, as published.",
        )


def _check_distilled(folder: Path) -> None:
    index = folder / "model_index.json"
    try:
        distilled = read_object(index).get("is_distilled", True)
    except (OSError, JsonError):
        # the file names classes only, which the components state themselves
        return
    if not distilled:
        raise CheckpointError(
            f"{index} states that the model is not distilled: it takes 50 steps and classifier-free guidance",
            "Give FLUX.2 [klein] itself instead of its base model.",
        )
