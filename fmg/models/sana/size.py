"""The sizes of a SANA pipeline folder from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from fmg.core.model_folder import wholes
from fmg.core.specs import ActivationBytes, Blocks, LinearModule
from fmg.models.common.size import TransformerSize

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

_DCAE: Mapping[str, object] = MappingProxyType(
    {"latent_channels": 32, "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]}
)
_SINUSOID_CHANNELS = 256

# Counted on diffusers' modules under PEFT with every allocation observed, for mlp_ratio 2.5 as published.
# The bytes in any dtype are the casts of linear attention and of the norms to fp32.
_KEPT, _BACKWARD, _FORWARD = ActivationBytes(18, 53), ActivationBytes(5, 0), ActivationBytes(12, 9)
# DC-AE's memory per pixel and channel of its last blocks, whose norms are fp32.
_DECODER = ActivationBytes(2.6, 7.8)


@dataclass(frozen=True)
class SanaSize(TransformerSize):
    """The sizes of a `SanaTransformer2DModel`; missing keys are as in SANA-Sprint 0.6B."""

    defaults: ClassVar[Mapping[str, object]] = SPRINT_06B
    stream: ClassVar[Literal["image", "both"]] = "image"
    # DC-AE f32c32 and Gemma 2 2B
    vae: ClassVar[Mapping[str, object]] = _DCAE
    decoder_parameters: ClassVar[int] = 312_250_275
    encoder_parameters: ClassVar[int] = 2_614_341_888

    @property
    def cross(self) -> int:
        """Width of cross-attention."""
        return self.number("num_cross_attention_heads") * self.number("cross_attention_head_dim")

    @property
    def convolution_weights(self) -> int:
        """Weights, without biases, of the convolutions of one block: 1 x 1, 3 x 3 in each channel, 1 x 1."""
        return self.width * 2 * self.hidden + 9 * 2 * self.hidden + self.hidden * self.width

    @property
    def parameters(self) -> int:
        width, patches = self.width, self.number("in_channels") * self.number("patch_size") ** 2
        norms = 2 * (width + self.cross) if self.known["qk_norm"] else 0
        block = self.convolution_weights + 2 * 2 * self.hidden + 6 * width + norms
        linears = sum(
            layer.inputs * layer.outputs + (layer.outputs if self._has_bias(layer) else 0) for layer in self.linears()
        )
        # the patch embedding is a convolution; then the norm of the caption, and the last scale and shift
        rest = (patches + 1) * width + width + 2 * width
        return linears + self.number("num_layers") * block + rest

    def linears(self) -> Iterator[LinearModule]:
        width, caption, cross = self.width, self.number("caption_channels"), self.cross
        guided = ("timestep_embedder", "guidance_embedder")
        for name in guided if self.known["guidance_embeds"] else ("emb.timestep_embedder",):
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

    @property
    def blocks(self) -> tuple[Blocks, ...]:
        return (Blocks(self.number("num_layers"), _KEPT, _BACKWARD, _FORWARD),)

    @property
    def patch(self) -> int:
        return self.number("patch_size")

    def other_flops(self, image: int, text: int) -> float:
        """Linear attention, by two products with a head x head matrix; cross-attention to the text; convolutions."""
        attention = 4 * image * self.width * self.number("attention_head_dim") + 4 * image * text * self.cross
        return self.number("num_layers") * (attention + 2 * image * self.convolution_weights)

    def conditioning(self, text: int) -> int:
        return text * self.number("caption_channels")

    def decoder(self, vae: Mapping[str, object]) -> ActivationBytes:
        """That of DC-AE grows with the channels of its last blocks."""
        widest = (wholes(vae, "decoder_block_out_channels") or [128])[0]
        return ActivationBytes(_DECODER.numbers * widest, _DECODER.fixed * widest)

    def _has_bias(self, layer: LinearModule) -> bool:
        unbiased = (".attn1.to_q", ".attn1.to_k", ".attn1.to_v")
        return bool(self.known["attention_bias"]) or not layer.name.endswith(unbiased)
