"""The parts of a FLUX.3 [klein] folder: Qwen3-VL as text encoder, and the autoencoder of FLUX.2."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers import AutoencoderKLFlux2, Flux3Transformer2DModel
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

from fmg.core.errors import CheckpointError
from fmg.models.common.pipeline_parts import Components, Family, load_components
from fmg.models.common.qwen import QwenText
from fmg.models.conventions import FlowMapConventions
from fmg.models.flux2.loading import check_parts

FLUX3_FAMILY = Family(
    "FLUX.3 [klein]",
    MappingProxyType(
        {
            "transformer": {"Flux3Transformer2DModel": Flux3Transformer2DModel},
            "vae": {"AutoencoderKLFlux2": AutoencoderKLFlux2},
            "text_encoder": {"Qwen3VLForConditionalGeneration": Qwen3VLForConditionalGeneration},
        }
    ),
    # prompts need only the tokenizer of the processor that the pipeline loads
    MappingProxyType({"tokenizer": Qwen2Tokenizer}),
)

# the states, the template and the positions of Flux3DistilledTextEncoderStep
_text = partial(QwenText, layers=(4, 8, 12, 16, 20, 24, 28, 32), padding_side="right", padding_position=1)


def load_parts(
    folder: Path,
    conventions: FlowMapConventions,
    device: torch.device,
    dtype: torch.dtype,
    text_device: torch.device | None = None,
) -> Components[QwenText]:
    """Loads a folder with the given conventions. Arguments and errors as for `load_components`."""
    components = load_components(FLUX3_FAMILY, folder, conventions, None, _text, device, dtype, text_device)
    if not components.transformer.config.flow_map:
        raise CheckpointError(
            f"The transformer in {folder} is not a flow map but a base model for 50 steps and classifier-free guidance",
            "Give a folder of the distilled model, whose transformer has a target_timestep_embedder.",
        )
    check_parts(components)
    return components
