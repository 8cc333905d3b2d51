"""The sizes of an SD3 pipeline folder, from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from fmg.core.specs import ActivationBytes, Blocks, LinearModule
from fmg.models.common.size import TransformerSize, conditioning_linears, joint_block

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
# Counted on diffusers' block with every allocation observed, with and without attention of the image alone. The bytes
# in any dtype are the casts of queries and keys to fp32 before their norms. The forward pass is that of the wider kind.
_DUAL_KEPT, _KEPT = ActivationBytes(8.7, 29.7), ActivationBytes(7, 16.2)
_BACKWARD, _FORWARD = ActivationBytes(6.2), ActivationBytes(11.2)
_WIDE = 16


@dataclass(frozen=True)
class SD3Size(TransformerSize):
    """The sizes of a `FlowMapSD3Transformer2DModel` with a second time; missing keys are as in SD3.5-Medium."""

    defaults: ClassVar[Mapping[str, object]] = SD35_MEDIUM
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    # CLIP ViT-L/14, OpenCLIP ViT-bigG/14 and T5-XXL
    encoder_parameters: ClassVar[int] = 123_650_304 + 694_659_840 + 4_762_310_656
    # the tokens of the two CLIPs precede those of T5
    more_text: ClassVar[int] = 77
    second_embedder: ClassVar[str] = SECOND_EMBEDDER

    @property
    def dual(self) -> frozenset[int]:
        """Blocks whose image tokens also attend among themselves."""
        stated = self.known["dual_attention_layers"]
        return frozenset(i for i in stated if type(i) is int) if isinstance(stated, list) else frozenset()

    @property
    def parameters(self) -> int:
        linears = sum((layer.inputs + 1) * layer.outputs for layer in self.linears())
        # queries and keys of both streams, and of the attention of the image alone
        norms = 4 * self.number("num_layers") + 2 * len(self.dual) if self.known["qk_norm"] else 0
        patches = (self.number("in_channels") * self.number("patch_size") ** 2 + 1) * self.width
        return linears + norms * self.number("attention_head_dim") + patches

    @property
    def patch(self) -> int:
        return self.number("patch_size")

    @property
    def tables(self) -> int:
        """Values in the stored position table, which is not a parameter."""
        return self.number("pos_embed_max_size") ** 2 * self.width

    def linears(self) -> Iterator[LinearModule]:
        width, layers = self.width, self.number("num_layers")
        yield from conditioning_linears(self.known, width, "time_text_embed.timestep_embedder", SECOND_EMBEDDER)
        for index in range(layers):
            dual, last = index in self.dual, index == layers - 1
            yield from joint_block(f"transformer_blocks.{index}", width, dual=dual, last=last)
        yield LinearModule("norm_out.linear", width, 2 * width, "row", "time")
        out = self.number("out_channels") * self.number("patch_size") ** 2
        yield LinearModule("proj_out", width, out, "image", "last")

    @property
    def blocks(self) -> tuple[Blocks, ...]:
        """Those with attention of the image alone, then the others."""
        dual = len(self.dual)
        return (
            Blocks(dual, _DUAL_KEPT, _BACKWARD, _FORWARD, _WIDE, _WIDE),
            Blocks(self.number("num_layers") - dual, _KEPT, _BACKWARD, _FORWARD, _WIDE, _WIDE),
        )

    def other_flops(self, image: int, text: int) -> float:
        return 4 * self.width * (self.number("num_layers") * (image + text) ** 2 + len(self.dual) * image**2)

    def conditioning(self, text: int) -> int:
        """Tokens, and the pooled states of both CLIPs."""
        return super().conditioning(text) + self.number("pooled_projection_dim")
