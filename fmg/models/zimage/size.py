"""The sizes of a Z-Image pipeline folder, from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from fmg.core.model_folder import stated_config, whole
from fmg.core.specs import ActivationBytes, Blocks, LinearModule, ModelGeometry
from fmg.models.common.size import FLUX_DECODER, FLUX_VAE, decoder_values, latent_scale, stored_parameters
from fmg.models.conventions import FlowMapConventions

Z_IMAGE: Mapping[str, object] = MappingProxyType(
    {
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "cap_feat_dim": 2560,
    }
)
"""The transformer of Z-Image-Turbo, for plans made before its files are fetched: the defaults of diffusers' class."""

PATCH = 2
QWEN3_4B = 4_022_468_096
"""Parameters of Qwen3-4B."""
_SINUSOID, _TIME_HIDDEN, _TIME = 256, 1024, 256

# Counted on diffusers' block with every allocation observed. The bytes in any dtype are the casts of norms and rotary
# positions to fp32.
_KEPT, _BACKWARD, _FORWARD = ActivationBytes(6, 48.2), ActivationBytes(4, 16), ActivationBytes(13.7)


@dataclass(frozen=True)
class ZImageSize:
    """The sizes of a `ZImageTransformer2DModel`.

    Args:
        config: as in `transformer/config.json` of a diffusers folder; missing keys are as in Z-Image-Turbo.
    """

    config: Mapping[str, object]

    @property
    def width(self) -> int:
        """Width of the token stream."""
        return self.number("dim")

    @property
    def parameters(self) -> int:
        """Number of parameters of the transformer."""
        biased = ("mlp.", "adaLN_modulation", "cap_embedder", "x_embedder", "final_layer")
        linears = sum(m.inputs * m.outputs + any(b in m.name for b in biased) * m.outputs for m in self.linears())
        blocks = self.number("n_layers") + 2 * self.number("n_refiner_layers")
        norms = blocks * (4 * self.width + 2 * (self.width // self.number("n_heads"))) + self.number("cap_feat_dim")
        # two padding tokens
        return linears + norms + 2 * self.width

    def linears(self) -> Iterator[LinearModule]:
        """Every linear layer, by its name in the state dict."""
        width, time, patch = self.width, min(self.width, _TIME), PATCH**2 * self.number("in_channels")
        name = f"{PATCH}-1"
        yield LinearModule(f"all_x_embedder.{name}", patch, width, "image", "latent")
        yield LinearModule(f"all_final_layer.{name}.linear", width, patch, "image", "last")
        yield LinearModule(f"all_final_layer.{name}.adaLN_modulation.1", time, width, "row", "time")
        yield LinearModule("t_embedder.mlp.0", _SINUSOID, _TIME_HIDDEN, "row", "sinusoid")
        yield LinearModule("t_embedder.mlp.2", _TIME_HIDDEN, time, "row", "time hidden")
        yield LinearModule("cap_embedder.1", self.number("cap_feat_dim"), width, "text", "tokens")
        refiners = self.number("n_refiner_layers")
        for index in range(refiners):
            yield from self._block(f"noise_refiner.{index}", "image")
            yield from self._block(f"context_refiner.{index}", "text")
        for index in range(self.number("n_layers")):
            yield from self._block(f"layers.{index}", "both")

    def number(self, key: str) -> int:
        """A whole number from the config."""
        return whole({**Z_IMAGE, **self.config}, key)

    def _block(self, block: str, tokens: Literal["image", "text", "both"]) -> Iterator[LinearModule]:
        width, hidden = self.width, int(self.width / 3 * 8)
        if tokens != "text":
            time = min(width, _TIME)
            yield LinearModule(f"{block}.adaLN_modulation.0", time, 4 * width, "row", "time")
        for name in ("to_q", "to_k", "to_v"):
            yield LinearModule(f"{block}.attention.{name}", width, width, tokens, f"{block} norm1")
        yield LinearModule(f"{block}.attention.to_out.0", width, width, tokens, f"{block} attention")
        for name in ("w1", "w3"):
            yield LinearModule(f"{block}.feed_forward.{name}", width, hidden, tokens, f"{block} norm2")
        yield LinearModule(f"{block}.feed_forward.w2", hidden, width, tokens, f"{block} hidden")


def zimage_geometry(
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
    vae = (None if folder is None else stated_config(folder / "vae")) or FLUX_VAE
    size = ZImageSize(stated or published)
    side, text = conventions.resolution // latent_scale(vae), conventions.max_sequence_length
    image, layers, refiners = (side // PATCH) ** 2, size.number("n_layers"), size.number("n_refiner_layers")
    attention = layers * (image + text) ** 2 + refiners * (image**2 + text**2)
    return ModelGeometry(
        origin="the published config" if stated is None else "its files",
        linears=tuple(size.linears()),
        parameters=size.parameters,
        width=size.width,
        stream="both",
        # a pair of refiners, of the image and of the text, sees as many tokens as one block of both
        blocks=(Blocks(layers + refiners, _KEPT, _BACKWARD, _FORWARD),),
        other_flops=4 * attention * size.width,
        image_tokens=image,
        text_tokens=text,
        conditioning=text * (size.number("cap_feat_dim") + 1),
        latent=size.number("in_channels") * side**2,
        resolution=conventions.resolution,
        encoder_parameters=stored_parameters(folder, "text_encoder") or QWEN3_4B,
        decoder_parameters=stored_parameters(folder, "vae") or FLUX_DECODER,
        decoder=ActivationBytes(decoder_values(vae)),
    )
