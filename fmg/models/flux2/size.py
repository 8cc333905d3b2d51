"""The sizes of a FLUX.2 pipeline folder, from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from fmg.core.specs import ActivationBytes, Blocks, LinearModule
from fmg.models.common.size import TransformerSize

KLEIN_4B: Mapping[str, object] = MappingProxyType(
    {
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "mlp_ratio": 3.0,
        "guidance_embeds": False,
        "axes_dims_rope": (32, 32, 32, 32),
        "timestep_guidance_channels": 256,
    }
)
"""The transformer of FLUX.2 [klein] 4B, for plans made before its files are fetched."""
KLEIN_9B: Mapping[str, object] = MappingProxyType(
    {
        **KLEIN_4B,
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
    }
)
"""The transformer of FLUX.2 [klein] 9B."""
_QWEN3: Mapping[int, int] = MappingProxyType({7680: 4_022_468_096, 12288: 8_190_735_360})
"""Parameters of the text encoder, Qwen3-4B or Qwen3-8B, by the width of its states."""
_VAE: Mapping[str, object] = MappingProxyType({"latent_channels": 32, "block_out_channels": [128, 256, 512, 512]})

# What the blocks of diffusers' FLUX.2 modules keep, counted under PEFT with every allocation observed. A pass without
# gradients needs most where a LoRA adapts the fused matrix of a single-stream block: in narrower dtypes PEFT adds its
# outputs, nine times as wide as the stream, in fp32.
_DOUBLE_KEPT, _SINGLE_KEPT = ActivationBytes(15, 8.4), ActivationBytes(12, 16.4)
_DOUBLE_BACKWARD, _SINGLE_BACKWARD = ActivationBytes(5.5), ActivationBytes(12.4, 10.5)
_DOUBLE_FORWARD, _SINGLE_FORWARD = ActivationBytes(14.3, 2), ActivationBytes(9.3, 82)


@dataclass(frozen=True)
class GatedSize(TransformerSize):
    """Shared by FLUX.2 and FLUX.3: gated feed-forwards without biases, and FLUX.2's autoencoder."""

    vae: ClassVar[Mapping[str, object]] = _VAE
    decoder_parameters: ClassVar[int] = 84_046_371

    @property
    def parameters(self) -> int:
        """Matrices, and norms of queries and keys."""
        return sum(m.inputs * m.outputs for m in self.linears()) + self.norms * self.number("attention_head_dim")

    @property
    @abstractmethod
    def norms(self) -> int:
        """Number of norms, each as wide as a head."""


@dataclass(frozen=True)
class Flux2Size(GatedSize):
    """The sizes of a `Flux2Transformer2DModel`; keys missing from the config are as in FLUX.2 [klein] 4B."""

    defaults: ClassVar[Mapping[str, object]] = KLEIN_4B

    @property
    def norms(self) -> int:
        """Four in a double-stream block, two in a single-stream block."""
        return 4 * self.number("num_layers", 0) + 2 * self.number("num_single_layers", 0)

    @property
    def blocks(self) -> tuple[Blocks, ...]:
        """Double-stream blocks, then single-stream blocks."""
        return (
            Blocks(self.number("num_layers", 0), _DOUBLE_KEPT, _DOUBLE_BACKWARD, _DOUBLE_FORWARD),
            Blocks(self.number("num_single_layers", 0), _SINGLE_KEPT, _SINGLE_BACKWARD, _SINGLE_FORWARD),
        )

    @property
    def encoder_parameters(self) -> int:
        """Of the Qwen3 whose states have this width."""
        return _QWEN3.get(self.number("joint_attention_dim"), _QWEN3[7680])

    def other_flops(self, image: int, text: int) -> float:
        layers = self.number("num_layers", 0) + self.number("num_single_layers", 0)
        return layers * 4 * (image + text) ** 2 * self.width

    def linears(self) -> Iterator[LinearModule]:
        width, channels = self.width, self.number("in_channels")
        yield LinearModule("x_embedder", channels, width, "image", "latent")
        yield LinearModule("context_embedder", self.number("joint_attention_dim"), width, "text", "tokens")
        embedder = "time_guidance_embed.timestep_embedder"
        yield LinearModule(f"{embedder}.linear_1", self.number("timestep_guidance_channels"), width, "row", "sinusoid")
        yield LinearModule(f"{embedder}.linear_2", width, width, "row", "time hidden")
        for name, outputs in (("double_stream_modulation_img", 6), ("double_stream_modulation_txt", 6)):
            yield LinearModule(f"{name}.linear", width, outputs * width, "row", name)
        yield LinearModule("single_stream_modulation.linear", width, 3 * width, "row", "single_stream_modulation")
        for index in range(self.number("num_layers", 0)):
            yield from self._double(f"transformer_blocks.{index}")
        for index in range(self.number("num_single_layers", 0)):
            block = f"single_transformer_blocks.{index}"
            fused = 3 * width + 2 * self.hidden
            yield LinearModule(f"{block}.attn.to_qkv_mlp_proj", width, fused, "both", f"{block} norm")
            yield LinearModule(f"{block}.attn.to_out", width + self.hidden, width, "both", f"{block} hidden")
        yield LinearModule("norm_out.linear", width, 2 * width, "row", "time")
        out = self.number("out_channels" if self.config.get("out_channels") else "in_channels")
        yield LinearModule("proj_out", width, out, "image", "last")

    def _double(self, block: str) -> Iterator[LinearModule]:
        width, hidden = self.width, self.hidden
        streams: tuple[tuple[Literal["image", "text"], tuple[str, ...], str, str], ...] = (
            ("image", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
            ("text", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
        )
        for tokens, projections, out, feed_forward in streams:
            for name in projections:
                yield LinearModule(f"{block}.attn.{name}", width, width, tokens, f"{block} {tokens} norm1")
            yield LinearModule(f"{block}.attn.{out}", width, width, tokens, f"{block} {tokens} attention")
            first, second = f"{block}.{feed_forward}.linear_in", f"{block}.{feed_forward}.linear_out"
            yield LinearModule(first, width, 2 * hidden, tokens, f"{block} {tokens} norm2")
            yield LinearModule(second, hidden, width, tokens, f"{block} {tokens} hidden")
