"""The sizes of an SD3 pipeline folder, from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

SD35_MEDIUM: Mapping[str, object] = MappingProxyType(
    {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
        "qk_norm": "rms_norm",
    }
)
"""The transformer of SD3.5-Medium, for plans made before its files are fetched."""

SECOND_EMBEDDER = "time_text_embed.delta_embedder"
CLIP_TOKENS = 77
"""Tokens of the two CLIPs, which precede those of T5."""
SD3_ENCODERS = 123_650_304 + 694_659_840 + 4_762_310_656
"""Parameters of CLIP ViT-L/14, OpenCLIP ViT-bigG/14 and T5-XXL, for plans made before the files are fetched."""

# Counted on diffusers' block with every allocation observed, with and without attention of the image alone. The bytes
# in any dtype are the casts of queries and keys to fp32 before their norms. The forward pass is that of the wider kind.
_DUAL_KEPT, _KEPT = ActivationBytes(8.7, 29.7), ActivationBytes(7, 16.2)
_BACKWARD, _FORWARD = ActivationBytes(6.2), ActivationBytes(11.2)
_WIDE = 16


@dataclass(frozen=True)
class SD3Size:
    """The sizes of a `FlowMapSD3Transformer2DModel` with a second time; missing keys are as in SD3.5-Medium."""

    config: Mapping[str, object]

    @property
    def width(self) -> int:
        """Width of both token streams."""
        return self.number("num_attention_heads") * self.number("attention_head_dim")

    @property
    def dual(self) -> frozenset[int]:
        """Blocks whose image tokens also attend among themselves."""
        stated = self._known["dual_attention_layers"]
        return frozenset(i for i in stated if type(i) is int) if isinstance(stated, list) else frozenset()

    @property
    def parameters(self) -> int:
        """Number of parameters of the transformer."""
        linears = sum((layer.inputs + 1) * layer.outputs for layer in self.linears())
        # queries and keys of both streams, and of the attention of the image alone
        norms = 4 * self.number("num_layers") + 2 * len(self.dual) if self._known["qk_norm"] else 0
        patches = (self.number("in_channels") * self.number("patch_size") ** 2 + 1) * self.width
        return linears + norms * self.number("attention_head_dim") + patches

    @property
    def positions(self) -> int:
        """Values in the stored position table, which is not a parameter."""
        return self.number("pos_embed_max_size") ** 2 * self.width

    def linears(self) -> Iterator[LinearModule]:
        """Every linear layer, by its name in the state dict."""
        width, layers = self.width, self.number("num_layers")
        yield from conditioning_linears(self._known, width, "time_text_embed.timestep_embedder", SECOND_EMBEDDER)
        for index in range(layers):
            dual, last = index in self.dual, index == layers - 1
            yield from joint_block(f"transformer_blocks.{index}", width, dual=dual, last=last)
        yield LinearModule("norm_out.linear", width, 2 * width, "row", "time")
        out = self.number("out_channels") * self.number("patch_size") ** 2
        yield LinearModule("proj_out", width, out, "image", "last")

    def number(self, key: str) -> int:
        """A whole number from the config."""
        return whole(self._known, key)

    @property
    def _known(self) -> Mapping[str, object]:
        return {**SD35_MEDIUM, **self.config}


def sd3_geometry(
    folder: Path | None,
    published: Mapping[str, object],
    conventions: FlowMapConventions,
) -> ModelGeometry:
    """The geometry of a pipeline folder; missing values are the published ones. Arguments as for `flux_geometry`."""
    stated = None if folder is None else stated_config(folder / "transformer")
    vae = (None if folder is None else stated_config(folder / "vae")) or FLUX_VAE
    size = SD3Size(stated or published)
    side, text = conventions.resolution // latent_scale(vae), CLIP_TOKENS + conventions.max_sequence_length
    image, layers, dual = (side // size.number("patch_size")) ** 2, size.number("num_layers"), len(size.dual)
    kinds = (
        Blocks(dual, _DUAL_KEPT, _BACKWARD, _FORWARD, _WIDE, _WIDE),
        Blocks(layers - dual, _KEPT, _BACKWARD, _FORWARD, _WIDE, _WIDE),
    )
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return ModelGeometry(
        origin="the published config" if stated is None else "its files",
        linears=tuple(size.linears()),
        parameters=size.parameters,
        width=size.width,
        stream="both",
        blocks=tuple(kind for kind in kinds if kind.count),
        other_flops=4 * size.width * (layers * (image + text) ** 2 + dual * image**2),
        image_tokens=image,
        text_tokens=text,
        conditioning=text * size.number("joint_attention_dim") + size.number("pooled_projection_dim"),
        latent=size.number("in_channels") * side**2,
        resolution=conventions.resolution,
        encoder_parameters=stored_parameters(folder, *encoders) or SD3_ENCODERS,
        decoder_parameters=stored_parameters(folder, "vae") or FLUX_DECODER,
        decoder=ActivationBytes(decoder_values(vae)),
        tables=size.positions,
        second_embedder=SECOND_EMBEDDER,
    )
