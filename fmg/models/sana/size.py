"""The sizes of a SANA pipeline folder from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fmg.core.errors import CheckpointError
from fmg.core.model_folder import RESTORE, stated_config, whole, wholes
from fmg.core.specs import ActivationBytes, Blocks, LinearModule, ModelGeometry
from fmg.models.common.size import stored_parameters
from fmg.models.conventions import FlowMapConventions

_COMMON: Mapping[str, object] = MappingProxyType(
    {
        "in_channels": 32,
        "attention_head_dim": 32,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "attention_bias": False,
        "guidance_embeds": True,
        "qk_norm": "rms_norm_across_heads",
        "patch_size": 1,
    }
)
SPRINT_06B: Mapping[str, object] = MappingProxyType(
    {
        **_COMMON,
        "num_layers": 28,
        "num_attention_heads": 36,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
    }
)
"""The transformer of SANA-Sprint 0.6B, for plans made before its files are fetched."""
SPRINT_16B: Mapping[str, object] = MappingProxyType(
    {
        **_COMMON,
        "num_layers": 20,
        "num_attention_heads": 70,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
    }
)
"""The transformer of SANA-Sprint 1.6B."""

_SINUSOID_CHANNELS = 256
_MAX_RATIO = 100


@dataclass(frozen=True)
class SanaSize:
    """The sizes of a `SanaTransformer2DModel`.

    Args:
        config: as in `transformer/config.json` of a diffusers folder; missing keys are as in SANA-Sprint 0.6B.
    """

    config: Mapping[str, object]

    @property
    def width(self) -> int:
        """Width of the token stream."""
        return self.number("num_attention_heads") * self.number("attention_head_dim")

    @property
    def hidden(self) -> int:
        """Channels of each half of the gated convolution of a block."""
        ratio = self._get("mlp_ratio")
        if not isinstance(ratio, int | float) or not 0 < ratio <= _MAX_RATIO:
            raise CheckpointError(f"The config of the model has {ratio!r:.60} for mlp_ratio", RESTORE)
        return int(ratio * self.width)

    @property
    def convolution_weights(self) -> int:
        """Weights, without biases, of the convolutions of one block: 1 x 1, 3 x 3 in each channel, 1 x 1."""
        return self.width * 2 * self.hidden + 9 * 2 * self.hidden + self.hidden * self.width

    @property
    def parameters(self) -> int:
        """Number of parameters of the transformer."""
        width, patches = self.width, self.number("in_channels") * self.number("patch_size") ** 2
        cross = self.number("num_cross_attention_heads") * self.number("cross_attention_head_dim")
        norms = 2 * (width + cross) if self._get("qk_norm") else 0
        block = self.convolution_weights + 2 * 2 * self.hidden + 6 * width + norms
        linears = sum(
            layer.inputs * layer.outputs + (layer.outputs if self._has_bias(layer) else 0) for layer in self.linears()
        )
        # the patch embedding is a convolution; then the norm of the caption, and the last scale and shift
        rest = (patches + 1) * width + width + 2 * width
        return linears + self.number("num_layers") * block + rest

    def linears(self) -> Iterator[LinearModule]:
        """Every linear layer, by its name in the state dict."""
        width, caption = self.width, self.number("caption_channels")
        cross = self.number("num_cross_attention_heads") * self.number("cross_attention_head_dim")
        guided = bool(self._get("guidance_embeds"))
        embedders = ["timestep_embedder", "guidance_embedder"] if guided else ["emb.timestep_embedder"]
        for name in embedders:
            yield LinearModule(f"time_embed.{name}.linear_1", _SINUSOID_CHANNELS, width, "row", name)
            yield LinearModule(f"time_embed.{name}.linear_2", width, width, "row", f"{name} hidden")
        yield LinearModule("time_embed.linear", width, 6 * width, "row", "time")
        yield LinearModule("caption_projection.linear_1", caption, width, "text", "tokens")
        yield LinearModule("caption_projection.linear_2", width, width, "text", "tokens hidden")
        for index in range(self.number("num_layers")):
            block = f"transformer_blocks.{index}"
            for name in ("to_q", "to_k", "to_v"):
                yield LinearModule(f"{block}.attn1.{name}", width, width, "image", f"{block} norm1")
            yield LinearModule(f"{block}.attn1.to_out.0", width, width, "image", f"{block} attention")
            yield LinearModule(f"{block}.attn2.to_q", width, cross, "image", f"{block} stream")
            for name in ("to_k", "to_v"):
                yield LinearModule(f"{block}.attn2.{name}", width, cross, "text", "caption")
            yield LinearModule(f"{block}.attn2.to_out.0", cross, width, "image", f"{block} cross-attention")
        out = self.number("out_channels" if self.config.get("out_channels") else "in_channels")
        yield LinearModule("proj_out", width, out * self.number("patch_size") ** 2, "image", "last")

    def number(self, key: str) -> int:
        """A whole number from the config."""
        return whole({**SPRINT_06B, **self.config}, key)

    def _get(self, key: str) -> object:
        return self.config.get(key, SPRINT_06B.get(key))

    def _has_bias(self, layer: LinearModule) -> bool:
        unbiased = (".attn1.to_q", ".attn1.to_k", ".attn1.to_v")
        return bool(self._get("attention_bias")) or not layer.name.endswith(unbiased)


GEMMA, DCAE = 2_614_341_888, 312_250_275
"""Parameters of Gemma 2 2B and of DC-AE f32c32, for plans made before the files are fetched."""

# Counted on diffusers' modules under PEFT with every allocation observed, for mlp_ratio 2.5 as published.
# The bytes in any dtype are the casts of linear attention and of the norms to fp32.
_KEPT, _BACKWARD, _FORWARD = ActivationBytes(18, 53), ActivationBytes(5, 0), ActivationBytes(12, 9)
# Of DC-AE for a pixel and channel of its last blocks, whose norms are fp32.
_DECODER = ActivationBytes(2.6, 7.8)
_SCALE = 32
_CHANNELS = 128


def sana_geometry(
    folder: Path | None,
    published: Mapping[str, object],
    conventions: FlowMapConventions,
) -> ModelGeometry:
    """The geometry of a pipeline folder; missing values are the published ones.

    Args:
        folder: a diffusers pipeline folder, or None when it has not been fetched.
        published: the transformer's config if the folder has none.
        conventions: resolution and text length.
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
        decoder=ActivationBytes(_DECODER.numbers * widest, _DECODER.fixed * widest),
    )


def _attention_flops(size: SanaSize, image: int, text: int) -> float:
    """Linear attention among image tokens, by two products with a head x head matrix; cross-attention to the text."""
    head = size.number("attention_head_dim")
    cross = size.number("num_cross_attention_heads") * size.number("cross_attention_head_dim")
    return 4 * image * size.width * head + 4 * image * text * cross
