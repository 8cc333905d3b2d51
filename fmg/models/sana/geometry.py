"""The geometry of a SANA pipeline folder from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fmg.core.geometry import Blocks, Holding, ModelGeometry
from fmg.core.model_folder import stated_config, wholes
from fmg.models.conventions import FlowMapConventions
from fmg.models.geometry import stored_parameters
from fmg.models.sana.size import SanaSize

GEMMA, DCAE = 2_614_341_888, 312_250_275
"""Parameters of Gemma 2 2B and of DC-AE f32c32, for plans made before the files are there."""

# Counted on diffusers' modules under PEFT with every allocation observed, for mlp_ratio 2.5 as published.
# The bytes in any dtype are the casts of linear attention and of the norms to fp32.
_KEPT, _BACKWARD, _FORWARD = Holding(18, 53), Holding(5, 0), Holding(12, 9)
# Of DC-AE for a pixel and channel of its last blocks, whose norms are fp32.
_DECODER = Holding(2.6, 7.8)
_SCALE = 32
_CHANNELS = 128


def sana_geometry(
    folder: Path | None,
    published: Mapping[str, object],
    conventions: FlowMapConventions,
    *,
    checkpointing: bool,
    encoders_resident: bool,
) -> ModelGeometry:
    """The geometry of a pipeline folder; what is not there is as published.

    Args:
        folder: a diffusers pipeline folder, or None when it has not been fetched.
        published: the transformer's config where the folder has none.
        conventions: resolution and text length.
        checkpointing: whether the model recomputes its blocks in the backward pass.
        encoders_resident: whether Gemma stays on the transformer's device.
    """
    stated = None if folder is None else stated_config(folder / "transformer")
    vae = (None if folder is None else stated_config(folder / "vae")) or {}
    size = SanaSize(stated or published)
    side, text, layers = conventions.resolution // _SCALE, conventions.max_sequence_length, size.number("num_layers")
    image = (side // size.number("patch_size")) ** 2
    widest = (wholes(vae, "decoder_block_out_channels") or [_CHANNELS])[0]
    return ModelGeometry(
        origin="the published config" if stated is None else "its files",
        linears=tuple(size.linears()),
        parameters=size.parameters,
        width=size.width,
        stream="image",
        blocks=(Blocks(layers, _KEPT, _BACKWARD, _FORWARD),),
        other_flops=layers * (_attention_flops(size, image, text) + 2 * image * size.convolution_weights),
        image_tokens=image,
        text_tokens=text,
        conditioning=text * size.number("caption_channels"),
        latent=size.number("in_channels") * side**2,
        resolution=conventions.resolution,
        encoder_parameters=stored_parameters(folder, "text_encoder") or GEMMA,
        decoder_parameters=stored_parameters(folder, "vae") or DCAE,
        decoder=Holding(_DECODER.numbers * widest, _DECODER.fixed * widest),
        checkpointing=checkpointing,
        encoders_resident=encoders_resident,
    )


def _attention_flops(size: SanaSize, image: int, text: int) -> float:
    """Linear attention among image tokens, by two products with a head x head matrix; cross-attention to the text."""
    head = size.number("attention_head_dim")
    cross = size.number("num_cross_attention_heads") * size.number("cross_attention_head_dim")
    return 4 * image * size.width * head + 4 * image * text * cross
