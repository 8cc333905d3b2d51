"""The sizes of a Z-Image pipeline folder, from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from fmg.core.specs import ActivationBytes, Blocks, LinearModule
from fmg.models.common.size import TOKEN, TransformerSize

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

_SINUSOID, _TIME_HIDDEN, _TIME = 256, 1024, 256

# Counted on diffusers' block with every allocation observed. The bytes in any dtype are the casts of norms and rotary
# positions to fp32.
_KEPT, _BACKWARD, _FORWARD = ActivationBytes(6, 48.2), ActivationBytes(4, 16), ActivationBytes(13.7)


@dataclass(frozen=True)
class ZImageSize(TransformerSize):
    """The sizes of a `ZImageTransformer2DModel`; missing keys are as in Z-Image-Turbo."""

    defaults: ClassVar[Mapping[str, object]] = Z_IMAGE
    # Qwen3-4B
    encoder_parameters: ClassVar[int] = 4_022_468_096

    @property
    def width(self) -> int:
        return self.number("dim")

    @property
    def parameters(self) -> int:
        biased = ("mlp.", "adaLN_modulation", "cap_embedder", "x_embedder", "final_layer")
        linears = sum(m.inputs * m.outputs + any(b in m.name for b in biased) * m.outputs for m in self.linears())
        blocks = self.number("n_layers") + 2 * self.number("n_refiner_layers")
        norms = blocks * (4 * self.width + 2 * (self.width // self.number("n_heads"))) + self.number("cap_feat_dim")
        # two padding tokens
        return linears + norms + 2 * self.width

    def linears(self) -> Iterator[LinearModule]:
        width, time, patch = self.width, min(self.width, _TIME), TOKEN**2 * self.number("in_channels")
        name = f"{TOKEN}-1"
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

    @property
    def blocks(self) -> tuple[Blocks, ...]:
        """A pair of refiners, of the image and of the text, sees as many tokens as one block of both."""
        return (Blocks(self.number("n_layers") + self.number("n_refiner_layers"), _KEPT, _BACKWARD, _FORWARD),)

    def other_flops(self, image: int, text: int) -> float:
        refined = self.number("n_refiner_layers") * (image**2 + text**2)
        return 4 * (self.number("n_layers") * (image + text) ** 2 + refined) * self.width

    def conditioning(self, text: int) -> int:
        """Tokens and their mask."""
        return text * (self.number("cap_feat_dim") + 1)

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
