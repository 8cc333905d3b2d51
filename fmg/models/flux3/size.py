"""The sizes of a FLUX.3 folder, from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from fmg.core.specs import ActivationBytes, Blocks, LinearModule
from fmg.models.flux2.size import GatedSize

FLUX3: Mapping[str, object] = MappingProxyType(
    {
        "in_channels": 128,
        "cond_in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 28,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 20480,
        "timestep_channels": 256,
        "mlp_ratio": 3.0,
        "flow_map": True,
    }
)
"""The defaults of diffusers' class, for plans made before the files of a model are fetched."""
_REFERENCE = "image_cond"
UNUSED = tuple(
    f"{module}.{_REFERENCE}"
    for module in ("mode_blocks", "x_embedders", "early_stream_modulations", "single_stream_modulations")
)
"""Modules for reference images, which are not used when generating from a prompt."""

# What the blocks of diffusers' FLUX.3 modules keep, counted under PEFT with every allocation observed. The modulations,
# which are made for every token, are kept once: they count with the backward pass of the last block.
_MODE_KEPT, _JOINT_KEPT = ActivationBytes(11.2, 5), ActivationBytes(13, 12.4)
_MODE_BACKWARD, _JOINT_BACKWARD = ActivationBytes(7.4), ActivationBytes(17)
_MODE_FORWARD, _JOINT_FORWARD = ActivationBytes(19), ActivationBytes(23.6, 2)

Tokens = Literal["image", "text", "both", "none"]


@dataclass(frozen=True)
class Flux3Size(GatedSize):
    """The sizes of a `Flux3Transformer2DModel`; keys missing from the config have the defaults of the class."""

    defaults: ClassVar[Mapping[str, object]] = FLUX3
    origin: ClassVar[str] = "the defaults of its class"
    # Qwen3-VL-4B, whose eight states have the default width of the class
    encoder_parameters: ClassVar[int] = 4_437_815_808
    second_embedder: ClassVar[str] = "target_timestep_embedder"

    @property
    def norms(self) -> int:
        """Width of queries and of keys."""
        return 2 * (3 * self.number("num_layers", 0) + self.number("num_single_layers", 0))

    @property
    def blocks(self) -> tuple[Blocks, ...]:
        """A block of the image and one of the text see as many tokens as one of both, and come first."""
        return (
            Blocks(self.number("num_layers", 0), _MODE_KEPT, _MODE_BACKWARD, _MODE_FORWARD),
            Blocks(self.number("num_single_layers", 0), _JOINT_KEPT, _JOINT_BACKWARD, _JOINT_FORWARD),
        )

    def other_flops(self, image: int, text: int) -> float:
        modes, joint = self.number("num_layers", 0), self.number("num_single_layers", 0)
        return 4 * self.width * (modes * (image**2 + text**2) + joint * (image + text) ** 2)

    def linears(self) -> Iterator[LinearModule]:
        width, layers = self.width, self.number("num_layers", 0)
        modes: tuple[tuple[str, Tokens], ...] = (("image", "image"), (_REFERENCE, "none"), ("txt", "text"))
        embedders = ["timestep_embedder", *([self.second_embedder] if self.config.get("flow_map") else [])]
        for name in embedders:
            yield LinearModule(f"{name}.linear_1", self.number("timestep_channels"), width, "row", name, bias=False)
            yield LinearModule(f"{name}.linear_2", width, width, "row", f"{name} hidden", bias=False)
        for mode, tokens in modes:
            for kind in ("early_stream_modulations", "single_stream_modulations"):
                yield LinearModule(f"{kind}.{mode}.linear", width, 3 * width, tokens, f"{mode} time")
        yield LinearModule("x_embedders.image", self.number("in_channels"), width, "image", "latent")
        yield LinearModule(f"x_embedders.{_REFERENCE}", self.number("cond_in_channels"), width, "none", "reference")
        yield LinearModule("context_embedder", self.number("joint_attention_dim"), width, "text", "tokens")
        for mode, tokens in modes:
            blocks = "txt_mode_blocks" if mode == "txt" else f"mode_blocks.{mode}"
            for index in range(layers):
                yield from self._block(f"{blocks}.{index}", tokens)
        for index in range(self.number("num_single_layers", 0)):
            yield from self._block(f"single_transformer_blocks.{index}", "both")
        yield LinearModule("norm_out.linear", width, 2 * width, "image", "image time out")
        yield LinearModule("proj_out", width, self.number("in_channels"), "image", "last")

    def _block(self, block: str, tokens: Tokens) -> Iterator[LinearModule]:
        width, hidden = self.width, self.hidden
        for name in ("to_q", "to_k", "to_v"):
            yield LinearModule(f"{block}.attn.{name}", width, width, tokens, f"{block} norm")
        yield LinearModule(f"{block}.attn.to_out.0", width, width, tokens, f"{block} attention")
        yield LinearModule(f"{block}.ff.linear_in", width, 2 * hidden, tokens, f"{block} norm")
        yield LinearModule(f"{block}.ff.linear_out", hidden, width, tokens, f"{block} hidden")
