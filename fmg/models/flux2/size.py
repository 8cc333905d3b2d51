"""The sizes of a FLUX.2 pipeline folder, from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

from fmg.core.errors import CheckpointError
from fmg.core.model_folder import RESTORE, stated_config, whole
from fmg.core.specs import ActivationBytes, Blocks, LinearModule, ModelGeometry
from fmg.models.common.size import decoder_values, latent_scale, stored_parameters
from fmg.models.conventions import FlowMapConventions
from fmg.models.flux.latents import PATCH

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
QWEN3_4B, QWEN3_8B = 4_022_468_096, 8_190_735_360
"""Parameters of the text encoders of the two sizes."""
FLUX2_DECODER = 84_046_371
"""Parameters of FLUX.2's autoencoder."""
_VAE: Mapping[str, object] = MappingProxyType({"latent_channels": 32, "block_out_channels": [128, 256, 512, 512]})
_MAX_RATIO = 100

# What the blocks of diffusers' FLUX.2 modules keep, counted under PEFT with every allocation observed. A pass without
# gradients needs most where a LoRA adapts the fused matrix of a single-stream block: in narrower dtypes PEFT adds in
# fp32 what has nine times the width.
_DOUBLE_KEPT, _SINGLE_KEPT = ActivationBytes(15, 8.4), ActivationBytes(12, 16.4)
_DOUBLE_BACKWARD, _SINGLE_BACKWARD = ActivationBytes(5.5), ActivationBytes(12.4, 10.5)
_DOUBLE_FORWARD, _SINGLE_FORWARD = ActivationBytes(14.3, 2), ActivationBytes(9.3, 82)


@dataclass(frozen=True)
class GatedSize(ABC):
    """Shared by the transformers of FLUX.2 and FLUX.3: gated feed-forwards, and no biases.

    Args:
        config: as in `transformer/config.json` of a diffusers folder.
    """

    defaults: ClassVar[Mapping[str, object]]
    """Values for keys that the config may omit."""

    config: Mapping[str, object]

    @property
    def width(self) -> int:
        """Width of the token stream."""
        return self.number("num_attention_heads") * self.number("attention_head_dim")

    @property
    def hidden(self) -> int:
        """Width of each half of a block's gated feed-forward."""
        ratio = {**self.defaults, **self.config}["mlp_ratio"]
        if not isinstance(ratio, int | float) or not 0 < ratio <= _MAX_RATIO:
            raise CheckpointError(f"The config of the model has {ratio!r:.60} for mlp_ratio", RESTORE)
        return int(self.width * ratio)

    @property
    def parameters(self) -> int:
        """Number of parameters of the transformer: matrices, and norms of queries and keys."""
        return sum(m.inputs * m.outputs for m in self.linears()) + self.norms * self.number("attention_head_dim")

    @property
    @abstractmethod
    def norms(self) -> int:
        """Number of norms, each as wide as a head."""

    @abstractmethod
    def linears(self) -> Iterator[LinearModule]:
        """Every linear layer, by its name in the state dict."""

    def number(self, key: str, least: int = 1) -> int:
        """A whole number from the config."""
        return whole({**self.defaults, **self.config}, key, least)


@dataclass(frozen=True)
class Flux2Size(GatedSize):
    """The sizes of a `Flux2Transformer2DModel`; keys missing from the config are as in FLUX.2 [klein] 4B."""

    defaults: ClassVar[Mapping[str, object]] = KLEIN_4B

    @property
    def norms(self) -> int:
        """Four in a double-stream block, two in a single-stream block."""
        return 4 * self.number("num_layers", 0) + 2 * self.number("num_single_layers", 0)

    def linears(self) -> Iterator[LinearModule]:
        """Every linear layer, by its name in the state dict."""
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


def flux2_latents(folder: Path | None, resolution: int) -> tuple[int, int, ActivationBytes]:
    """Tokens of an image, numbers of its latent, and what decoding it takes, with FLUX.2's autoencoder."""
    vae = (None if folder is None else stated_config(folder / "vae")) or _VAE
    side = resolution // latent_scale(vae)
    return (side // PATCH) ** 2, whole(vae, "latent_channels") * side**2, ActivationBytes(decoder_values(vae))


def flux2_geometry(
    folder: Path | None,
    published: Mapping[str, object],
    conventions: FlowMapConventions,
    *,
    encoder_parameters: int,
) -> ModelGeometry:
    """The geometry of a pipeline folder; missing values are the published ones.

    Args:
        folder: a diffusers pipeline folder, or None when it has not been fetched.
        published: the transformer's config if the folder has none.
        conventions: resolution and text length.
        encoder_parameters: parameters of the text encoder if the folder has none.
    """
    stated = None if folder is None else stated_config(folder / "transformer")
    size, text = Flux2Size(stated or published), conventions.max_sequence_length
    image, latent, decoder = flux2_latents(folder, conventions.resolution)
    double, single = size.number("num_layers", 0), size.number("num_single_layers", 0)
    kinds = (
        Blocks(double, _DOUBLE_KEPT, _DOUBLE_BACKWARD, _DOUBLE_FORWARD),
        Blocks(single, _SINGLE_KEPT, _SINGLE_BACKWARD, _SINGLE_FORWARD),
    )
    return ModelGeometry(
        origin="the published config" if stated is None else "its files",
        linears=tuple(size.linears()),
        parameters=size.parameters,
        width=size.width,
        stream="both",
        blocks=tuple(kind for kind in kinds if kind.count),
        # attention
        other_flops=(double + single) * 4 * (image + text) ** 2 * size.width,
        image_tokens=image,
        text_tokens=text,
        conditioning=text * size.number("joint_attention_dim"),
        latent=latent,
        resolution=conventions.resolution,
        encoder_parameters=stored_parameters(folder, "text_encoder") or encoder_parameters,
        decoder_parameters=stored_parameters(folder, "vae") or FLUX2_DECODER,
        decoder=decoder,
    )
