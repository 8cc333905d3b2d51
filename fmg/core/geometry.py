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
class Holding:
    """Memory for one unit of work: some numbers in the dtype of the network, and bytes that are there in any dtype."""

    numbers: float
    fixed: float = 0.0

    def size(self, number: int) -> float:
        """Bytes, for numbers of `number` bytes."""
        return self.numbers * number + self.fixed


@dataclass(frozen=True)
class Blocks:
    """Equal transformer blocks in a row, and what one of them holds for each token and feature of the stream.

    Attributes:
        count: how many there are.
        kept: for the backward pass, without what a LoRA keeps.
        backward: while the backward pass of a block runs, besides.
        forward: the most at once without gradients.
        forward_wide: added to `forward` when a LoRA adapts a layer four times as wide as the stream, in fp32.
        low_wide: the same for narrower dtypes.
    """

    count: int
    kept: Holding
    backward: Holding
    forward: Holding
    forward_wide: int = 0
    low_wide: int = 0


@dataclass(frozen=True)
class ModelGeometry:
    """A generator in numbers.

    Attributes:
        origin: where the numbers come from, for people.
        linears: every linear layer of the transformer.
        parameters: of the transformer.
        width: of its token stream.
        stream: which tokens the stream has.
        blocks: the kinds of its blocks, in the order in which they run.
        other_flops: floating-point operations of one call besides the linear layers: attention and convolutions.
        image_tokens: tokens of one image.
        text_tokens: text tokens of one prompt.
        conditioning: numbers that condition one sample.
        latent: numbers of one latent.
        resolution: side of the image in pixels.
        encoder_parameters: of the text encoders together.
        decoder_parameters: of the autoencoder.
        decoder: what decoding holds at once for one pixel of the image.
        checkpointing: whether blocks are computed again in the backward pass.
        encoders_resident: whether the text encoders stay on the device of the transformer.
    """

    origin: str
    linears: tuple[LinearModule, ...]
    parameters: int
    width: int
    stream: Literal["image", "both"]
    blocks: tuple[Blocks, ...]
    other_flops: float
    image_tokens: int
    text_tokens: int
    conditioning: int
    latent: int
    resolution: int
    encoder_parameters: int
    decoder_parameters: int
    decoder: Holding
    checkpointing: bool
    encoders_resident: bool

    @property
    def tokens(self) -> Mapping[str, int]:
        """Tokens of one sample that a layer sees, by `LinearModule.tokens`."""
        both = self.image_tokens + self.text_tokens
        return {"image": self.image_tokens, "text": self.text_tokens, "both": both, "row": 1}

    @property
    def call_flops(self) -> float:
        """Floating-point operations of one forward pass of one sample."""
        tokens = self.tokens
        products = sum(2 * layer.inputs * layer.outputs * tokens[layer.tokens] for layer in self.linears)
        return products + self.other_flops

    @property
    def unit(self) -> int:
        """Tokens x width of the stream of one sample."""
        return self.tokens[self.stream] * self.width
