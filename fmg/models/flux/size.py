"""The sizes of a FLUX-class pipeline folder, from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from fmg.core.model_folder import stated_config
from fmg.core.specs import ActivationBytes, Blocks, LinearModule, ModelGeometry
from fmg.models.common.size import TransformerSize, conditioning_linears, joint_block
from fmg.models.conventions import FlowMapConventions

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


# What the blocks of diffusers' FLUX modules hold, counted under PEFT with every allocation observed. Kept: the input of
# the activation function (4), of its norms (2, or 1 in a single-stream block), q, k, v and the output of attention (4),
# and q and k before their norms, which are fp32.
_DOUBLE_KEPT, _SINGLE_KEPT = ActivationBytes(10, 8), ActivationBytes(9, 8)
_DOUBLE_BACKWARD, _SINGLE_BACKWARD = ActivationBytes(5.5, 1), ActivationBytes(9.5, 7.5)
_DOUBLE_FORWARD, _SINGLE_FORWARD = ActivationBytes(9, 9), ActivationBytes(13, 9)
_WIDE = 16


@dataclass(frozen=True)
class FluxSize(TransformerSize):
    """The sizes of a `FlowMapFluxTransformer2DModel`; missing keys are as in FLUX.1-lite.

    Args:
        second_time: whether there is a second-time embedder.
    """

    defaults: ClassVar[Mapping[str, object]] = FLUX_LITE
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    # CLIP ViT-L/14 and T5-XXL
    encoder_parameters: ClassVar[int] = 123_060_480 + 4_762_310_656
    second_embedder: ClassVar[str] = SECOND_EMBEDDER

    second_time: bool = True

    @property
    def parameters(self) -> int:
        """Linear layers, and norms of queries and keys."""
        norms = 4 * self.number("num_layers", 0) + 2 * self.number("num_single_layers", 0)
        return sum((m.inputs + 1) * m.outputs for m in self.linears()) + norms * self.number("attention_head_dim")

    @property
    def blocks(self) -> tuple[Blocks, ...]:
        """Double-stream blocks, then single-stream blocks."""
        return (
            Blocks(self.number("num_layers", 0), _DOUBLE_KEPT, _DOUBLE_BACKWARD, _DOUBLE_FORWARD, _WIDE, _WIDE),
            Blocks(self.number("num_single_layers", 0), _SINGLE_KEPT, _SINGLE_BACKWARD, _SINGLE_FORWARD, 0, _WIDE),
        )

    def other_flops(self, image: int, text: int) -> float:
        layers = self.number("num_layers", 0) + self.number("num_single_layers", 0)
        return layers * 4 * (image + text) ** 2 * self.width

    def conditioning(self, text: int) -> int:
        """Tokens of T5, and the pooled states of CLIP."""
        return super().conditioning(text) + self.number("pooled_projection_dim")

    def linears(self) -> Iterator[LinearModule]:
        width, channels = self.width, self.number("in_channels")
        embedders = ["time_text_embed.timestep_embedder"]
        embedders += ["time_text_embed.guidance_embedder"] if self.known["guidance_embeds"] else []
        embedders += [SECOND_EMBEDDER] if self.second_time else []
        yield LinearModule("x_embedder", channels, width, "image", "latent")
        yield from conditioning_linears(self.known, width, *embedders)
        for index in range(self.number("num_layers", 0)):
            yield from joint_block(f"transformer_blocks.{index}", width)
        for index in range(self.number("num_single_layers", 0)):
            yield from _single_block(f"single_transformer_blocks.{index}", width)
        yield LinearModule("norm_out.linear", width, 2 * width, "row", "time")
        out = self.number("out_channels" if self.config.get("out_channels") else "in_channels")
        yield LinearModule("proj_out", width, out, "image", "last")


def _single_block(block: str, width: int) -> Iterator[LinearModule]:
    yield LinearModule(f"{block}.norm.linear", width, 3 * width, "row", "time")
    yield LinearModule(f"{block}.proj_mlp", width, 4 * width, "both", f"{block} norm")
    yield LinearModule(f"{block}.proj_out", 5 * width, width, "both", f"{block} hidden")
    for name in ("to_q", "to_k", "to_v"):
        yield LinearModule(f"{block}.attn.{name}", width, width, "both", f"{block} norm")


def transformer_parameters(config: Mapping[str, object], *, second_time: bool) -> int:
    """Number of parameters of a `FlowMapFluxTransformer2DModel`. Arguments as for `FluxSize`."""
    return FluxSize(config, second_time).parameters


def flux_geometry(
    folder: Path | None,
    conventions: FlowMapConventions,
    *,
    published: Mapping[str, object] = FLUX_LITE,
    **options: Any,
) -> ModelGeometry:
    """As `TransformerSize.geometry`, but also single keys that the folder leaves out are the published ones.

    Args:
        folder: a diffusers pipeline folder, or None when it has not been fetched.
        conventions: resolution, text length and second time.
        published: the transformer's config, or what a folder's own leaves out.
        options: further attributes of the result.
    """
    stated = None if folder is None else stated_config(folder / "transformer")
    size = FluxSize({**published, **(stated or {})}, bool(conventions.second_time))
    return replace(size.within(folder, conventions, size.origin if stated is None else "its files"), **options)
