"""The measures of a model that a plan computes with: counts and widths, no tensors. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LinearModule:
    """One linear layer of a network.

    Attributes:
        name: its name in the state dict, without `.weight`.
        inputs: features in.
        outputs: features out.
        tokens: which tokens of a sample pass through it; `row` is one vector a sample.
        source: layers of one block with the same source read the same tensor.
    """

    name: str
    inputs: int
    outputs: int
    tokens: Literal["image", "text", "both", "row"]
    source: str


@dataclass(frozen=True)
class ModelGeometry:
    """A FLUX-class generator in numbers.

    Attributes:
        origin: where the numbers come from, for people.
        linears: every linear layer of the transformer.
        parameters: of the transformer.
        width: of its token stream.
        double_blocks: blocks with separate weights for image and text.
        single_blocks: blocks with common weights.
        image_tokens: tokens of one image.
        text_tokens: T5 tokens of one prompt.
        conditioning: numbers that condition one sample (T5 states and pooled CLIP state).
        latent: numbers of one latent.
        resolution: side of the image in pixels.
        encoder_parameters: of the text encoders together.
        decoder_parameters: of the autoencoder.
        decoder_values: numbers that decoding holds at once for one pixel of the image.
        checkpointing: whether blocks are computed again in the backward pass.
        encoders_resident: whether the text encoders stay on the device of the transformer.
    """

    origin: str
    linears: tuple[LinearModule, ...]
    parameters: int
    width: int
    double_blocks: int
    single_blocks: int
    image_tokens: int
    text_tokens: int
    conditioning: int
    latent: int
    resolution: int
    encoder_parameters: int
    decoder_parameters: int
    decoder_values: int
    checkpointing: bool
    encoders_resident: bool

    @property
    def tokens(self) -> Mapping[str, int]:
        """Tokens of one sample that a layer sees, by `LinearModule.tokens`."""
        both = self.image_tokens + self.text_tokens
        return {"image": self.image_tokens, "text": self.text_tokens, "both": both, "row": 1}

    @property
    def call_flops(self) -> float:
        """Floating-point operations of one forward pass of one sample: matrix products and attention."""
        tokens = self.tokens
        products = sum(2 * layer.inputs * layer.outputs * tokens[layer.tokens] for layer in self.linears)
        return products + (self.double_blocks + self.single_blocks) * 4 * tokens["both"] ** 2 * self.width
