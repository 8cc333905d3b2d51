"""Parameters of a SANA transformer from its `config.json`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fmg.core.errors import CheckpointError
from fmg.core.geometry import LinearModule
from fmg.core.model_folder import RESTORE, whole

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
"""The transformer of SANA-Sprint 0.6B, for plans that are made before its files are there."""
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
        config: as in `transformer/config.json` of a diffusers folder; what it leaves out is as in
            SANA-Sprint 0.6B.
    """

    config: Mapping[str, object]

    @property
    def width(self) -> int:
        """Of the token stream."""
        return self.number("num_attention_heads") * self.number("attention_head_dim")

    @property
    def hidden(self) -> int:
        """Channels of the gated convolution of a block, of which there are two halves."""
        ratio = self._get("mlp_ratio")
        if not isinstance(ratio, int | float) or not 0 < ratio <= _MAX_RATIO:
            raise CheckpointError(f"The config of the model has {ratio!r:.60} for mlp_ratio", RESTORE)
        return int(ratio * self.width)

    @property
    def convolution_weights(self) -> int:
        """Of the convolutions of one block: 1 x 1, 3 x 3 in each channel, 1 x 1; the first two have biases besides."""
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
        """A whole number of the config."""
        return whole({**SPRINT_06B, **self.config}, key)

    def _get(self, key: str) -> object:
        return self.config.get(key, SPRINT_06B.get(key))

    def _has_bias(self, layer: LinearModule) -> bool:
        unbiased = (".attn1.to_q", ".attn1.to_k", ".attn1.to_v")
        return bool(self._get("attention_bias")) or not layer.name.endswith(unbiased)
