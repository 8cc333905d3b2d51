"""The sizes of a FLUX-class pipeline folder, from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from fmg.core.model_folder import stated_config, whole
from fmg.core.specs import ActivationBytes, Blocks, LinearModule, ModelGeometry
from fmg.models.common.size import (
    FLUX_DECODER,
    FLUX_VAE,
    conditioning_linears,
    decoder_values,
    joint_block,
    latent_scale,
    stored_parameters,
)
from fmg.models.conventions import FlowMapConventions
from fmg.models.flux.latents import PATCH

FLUX_LITE: Mapping[str, object] = MappingProxyType(
    {
        "in_channels": 64,
        "num_layers": 8,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    }
)
"""The transformer of FLUX.1-lite-8B, for plans made before its files are fetched."""

FLUX_SCHNELL: Mapping[str, object] = MappingProxyType({**FLUX_LITE, "num_layers": 19, "guidance_embeds": False})
"""The transformer of FLUX.1 [schnell]."""

SECOND_EMBEDDER = "timestep_embedder2"


def transformer_parameters(config: Mapping[str, object], *, second_time: bool) -> int:
    """Number of parameters of a `FlowMapFluxTransformer2DModel` with this config.

    Args:
        config: as in `transformer/config.json` of a diffusers folder; missing keys are taken from FLUX.1-lite.
        second_time: whether there is a second-time embedder.
    """
    known = {**FLUX_LITE, **config}
    linears = sum((m.inputs + 1) * m.outputs for m in transformer_linears(known, second_time=second_time))
    norms = 4 * whole(known, "num_layers", 0) + 2 * whole(known, "num_single_layers", 0)
    return linears + norms * whole(known, "attention_head_dim")


FLUX_ENCODERS = 123_060_480 + 4_762_310_656
"""Parameters of FLUX's CLIP ViT-L/14 and T5-XXL text encoders, for plans made before the files are fetched."""

# What the blocks of diffusers' FLUX modules hold, counted under PEFT with every allocation observed. Kept: the input of
# the activation function (4), of its norms (2, or 1 in a single-stream block), q, k, v and the output of attention (4),
# and q and k before their norms, which are fp32.
_DOUBLE_KEPT, _SINGLE_KEPT = ActivationBytes(10, 8), ActivationBytes(9, 8)
_DOUBLE_BACKWARD, _SINGLE_BACKWARD = ActivationBytes(5.5, 1), ActivationBytes(9.5, 7.5)
_DOUBLE_FORWARD, _SINGLE_FORWARD = ActivationBytes(9, 9), ActivationBytes(13, 9)
_WIDE = 16


def flux_geometry(
    folder: Path | None,
    conventions: FlowMapConventions,
    *,
    checkpointing: bool = False,
    encoders_resident: bool = True,
    published: Mapping[str, object] = FLUX_LITE,
    decoder_tile: int | None = None,
) -> ModelGeometry:
    """The geometry of a pipeline folder; missing values are the published ones.

    Args:
        folder: a diffusers pipeline folder, or None when it has not been fetched.
        conventions: resolution, text length and second time.
        checkpointing: whether the model recomputes its blocks in the backward pass.
        encoders_resident: whether T5 and CLIP stay on the transformer's device.
        published: the transformer's config if the folder has none.
        decoder_tile: side of the tiles in pixels that images are decoded in.
    """
    stated = None if folder is None else stated_config(folder / "transformer")
    vae = (None if folder is None else stated_config(folder / "vae")) or FLUX_VAE
    config = {**published, **(stated or {})}
    second_time = bool(conventions.second_time)
    head = whole(config, "attention_head_dim")
    double, single = whole(config, "num_layers", 0), whole(config, "num_single_layers", 0)
    channels = whole(vae, "latent_channels")
    side = conventions.resolution // latent_scale(vae)
    text, image, width = (
        conventions.max_sequence_length,
        (side // PATCH) ** 2,
        head * whole(config, "num_attention_heads"),
    )
    kinds = (
        Blocks(double, _DOUBLE_KEPT, _DOUBLE_BACKWARD, _DOUBLE_FORWARD, _WIDE, _WIDE),
        Blocks(single, _SINGLE_KEPT, _SINGLE_BACKWARD, _SINGLE_FORWARD, 0, _WIDE),
    )
    return ModelGeometry(
        origin="the published config" if stated is None else "its files",
        linears=tuple(transformer_linears(config, second_time=second_time)),
        parameters=transformer_parameters(config, second_time=second_time),
        width=width,
        stream="both",
        blocks=tuple(kind for kind in kinds if kind.count),
        # attention
        other_flops=(double + single) * 4 * (image + text) ** 2 * width,
        image_tokens=image,
        text_tokens=text,
        conditioning=text * whole(config, "joint_attention_dim") + whole(config, "pooled_projection_dim"),
        latent=channels * side**2,
        resolution=conventions.resolution,
        encoder_parameters=stored_parameters(folder, "text_encoder", "text_encoder_2") or FLUX_ENCODERS,
        decoder_parameters=stored_parameters(folder, "vae") or FLUX_DECODER,
        decoder=ActivationBytes(decoder_values(vae)),
        checkpointing=checkpointing,
        encoders_resident=encoders_resident,
        decoder_tile=decoder_tile,
        second_embedder=SECOND_EMBEDDER,
    )


def transformer_linears(config: Mapping[str, object], *, second_time: bool) -> Iterator[LinearModule]:
    """Every linear layer of a `FlowMapFluxTransformer2DModel` with this config, by its name in the state dict."""
    width = whole(config, "num_attention_heads") * whole(config, "attention_head_dim")
    channels = whole(config, "in_channels")
    embedders = ["time_text_embed.timestep_embedder"]
    embedders += ["time_text_embed.guidance_embedder"] if config.get("guidance_embeds") else []
    embedders += [SECOND_EMBEDDER] if second_time else []
    yield LinearModule("x_embedder", channels, width, "image", "latent")
    yield from conditioning_linears(config, width, *embedders)
    for index in range(whole(config, "num_layers", 0)):
        yield from joint_block(f"transformer_blocks.{index}", width)
    for index in range(whole(config, "num_single_layers", 0)):
        yield from _single_block(f"single_transformer_blocks.{index}", width)
    yield LinearModule("norm_out.linear", width, 2 * width, "row", "time")
    out = whole(config, "out_channels") if config.get("out_channels") else channels
    yield LinearModule("proj_out", width, out, "image", "last")


def _single_block(block: str, width: int) -> Iterator[LinearModule]:
    yield LinearModule(f"{block}.norm.linear", width, 3 * width, "row", "time")
    yield LinearModule(f"{block}.proj_mlp", width, 4 * width, "both", f"{block} norm")
    yield LinearModule(f"{block}.proj_out", 5 * width, width, "both", f"{block} hidden")
    for name in ("to_q", "to_k", "to_v"):
        yield LinearModule(f"{block}.attn.{name}", width, width, "both", f"{block} norm")
