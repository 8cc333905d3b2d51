"""The geometry of a FLUX-class pipeline folder from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from fmg.core.geometry import LinearModule, ModelGeometry
from fmg.models.conventions import FlowMapConventions
from fmg.models.flux.size import FLUX_LITE

FLUX_ENCODERS = 123_060_480 + 4_762_310_656
"""Parameters of FLUX's CLIP ViT-L/14 and T5-XXL text encoders, for plans made before the files are there."""
FLUX_DECODER = 83_819_683
"""Parameters of FLUX's autoencoder."""
FLUX_VAE: Mapping[str, object] = MappingProxyType(
    {"_class_name": "AutoencoderKL", "latent_channels": 16, "block_out_channels": [128, 256, 512, 512]}
)

_SINUSOID = 256
_PATCH = 2
_FLOATS = ("F64", "F32", "F16", "BF16")
# Feature maps at full resolution that are alive at once while the last blocks of an autoencoder run, measured.
_KL_WIDE, _KL_NARROW, _TINY = 3, 5, 2


def flux_geometry(
    folder: Path | None,
    conventions: FlowMapConventions,
    *,
    checkpointing: bool = False,
    encoders_resident: bool = True,
) -> ModelGeometry:
    """The geometry of a pipeline folder; what is not there is taken from FLUX.1-lite-8B.

    Args:
        folder: a diffusers pipeline folder, or None when it has not been fetched.
        conventions: resolution, text length and second time.
        checkpointing: whether the model recomputes its blocks in the backward pass.
        encoders_resident: whether T5 and CLIP stay on the transformer's device.
    """
    stated = None if folder is None else _read_json(folder / "transformer" / "config.json")
    vae = (None if folder is None else _read_json(folder / "vae" / "config.json")) or FLUX_VAE
    config = {**FLUX_LITE, **(stated or {})}
    linears = tuple(transformer_linears(config, second_time=conventions.second_time != "none"))
    head = _int(config, "attention_head_dim")
    double, single = _int(config, "num_layers"), _int(config, "num_single_layers")
    channels = _int(vae, "latent_channels")
    side = conventions.resolution // latent_scale(vae)
    text = conventions.max_sequence_length
    return ModelGeometry(
        origin="FLUX.1-lite-8B" if stated is None else "its files",
        linears=linears,
        parameters=sum((m.inputs + 1) * m.outputs for m in linears) + (4 * double + 2 * single) * head,
        width=_int(config, "num_attention_heads") * head,
        double_blocks=double,
        single_blocks=single,
        image_tokens=(side // _PATCH) ** 2,
        text_tokens=text,
        conditioning=text * _int(config, "joint_attention_dim") + _int(config, "pooled_projection_dim"),
        latent=channels * side**2,
        resolution=conventions.resolution,
        encoder_parameters=_stored(folder, "text_encoder", "text_encoder_2") or FLUX_ENCODERS,
        decoder_parameters=_stored(folder, "vae") or FLUX_DECODER,
        decoder_values=_decoder_values(vae),
        checkpointing=checkpointing,
        encoders_resident=encoders_resident,
    )


def transformer_linears(config: Mapping[str, object], *, second_time: bool) -> Iterator[LinearModule]:
    """Every linear layer of a `FlowMapFluxTransformer2DModel` with this config, by its name in the state dict."""
    width = _int(config, "num_attention_heads") * _int(config, "attention_head_dim")
    channels = _int(config, "in_channels")
    embedders = ["time_text_embed.timestep_embedder"]
    embedders += ["time_text_embed.guidance_embedder"] if config.get("guidance_embeds") else []
    embedders += ["timestep_embedder2"] if second_time else []
    yield LinearModule("x_embedder", channels, width, "image", "latent")
    yield LinearModule("context_embedder", _int(config, "joint_attention_dim"), width, "text", "tokens")
    for name in embedders:
        yield LinearModule(f"{name}.linear_1", _SINUSOID, width, "row", name)
        yield LinearModule(f"{name}.linear_2", width, width, "row", f"{name} hidden")
    pooled = "time_text_embed.text_embedder"
    yield LinearModule(f"{pooled}.linear_1", _int(config, "pooled_projection_dim"), width, "row", "pooled")
    yield LinearModule(f"{pooled}.linear_2", width, width, "row", "pooled hidden")
    for index in range(_int(config, "num_layers")):
        yield from _double_block(f"transformer_blocks.{index}", width)
    for index in range(_int(config, "num_single_layers")):
        yield from _single_block(f"single_transformer_blocks.{index}", width)
    yield LinearModule("norm_out.linear", width, 2 * width, "row", "time")
    yield LinearModule("proj_out", width, int(str(config.get("out_channels") or channels)), "image", "last")


def latent_scale(vae: Mapping[str, object]) -> int:
    """Image pixels along the side of one latent pixel."""
    return int(2 ** (len(_channels(vae)) - 1))


def _double_block(block: str, width: int) -> Iterator[LinearModule]:
    streams: tuple[tuple[Literal["image", "text"], str, tuple[str, ...], str, str], ...] = (
        ("image", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
        ("text", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
    )
    for tokens, norm, projections, out, feed_forward in streams:
        yield LinearModule(f"{block}.{norm}.linear", width, 6 * width, "row", "time")
        for name in projections:
            yield LinearModule(f"{block}.attn.{name}", width, width, tokens, f"{block} {tokens} norm1")
        yield LinearModule(f"{block}.attn.{out}", width, width, tokens, f"{block} {tokens} attention")
        first, second = f"{block}.{feed_forward}.net.0.proj", f"{block}.{feed_forward}.net.2"
        yield LinearModule(first, width, 4 * width, tokens, f"{block} {tokens} norm2")
        yield LinearModule(second, 4 * width, width, tokens, f"{block} {tokens} hidden")


def _single_block(block: str, width: int) -> Iterator[LinearModule]:
    yield LinearModule(f"{block}.norm.linear", width, 3 * width, "row", "time")
    yield LinearModule(f"{block}.proj_mlp", width, 4 * width, "both", f"{block} norm")
    yield LinearModule(f"{block}.proj_out", 5 * width, width, "both", f"{block} hidden")
    for name in ("to_q", "to_k", "to_v"):
        yield LinearModule(f"{block}.attn.{name}", width, width, "both", f"{block} norm")


def _decoder_values(vae: Mapping[str, object]) -> int:
    channels = _channels(vae)
    if vae.get("_class_name") == "AutoencoderTiny":
        return _TINY * channels[0]
    return max(_KL_WIDE * channels[min(1, len(channels) - 1)], _KL_NARROW * channels[0])


def _channels(vae: Mapping[str, object]) -> list[int]:
    stated = vae.get("block_out_channels") or vae.get("decoder_block_out_channels")
    return [int(c) for c in stated] if isinstance(stated, list) else [128, 256, 512, 512]


def _stored(folder: Path | None, *components: str) -> int:
    """Parameters in the safetensors files of some components, by their headers; 0 when one has no file."""
    total = 0
    for name in components:
        files = [] if folder is None else sorted((folder / name).glob("*.safetensors"))
        if not files:
            return 0
        total += sum(math.prod(entry["shape"]) for file in files for entry in _header(file))
    return total


def _header(file: Path) -> list[dict[str, list[int]]]:
    """The tensors that a safetensors file announces: eight bytes of length, then JSON."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return [entry for name, entry in header.items() if name != "__metadata__" and entry["dtype"] in _FLOATS]


def _read_json(file: Path) -> dict[str, object] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _int(config: Mapping[str, object], key: str) -> int:
    return int(str(config[key]))
