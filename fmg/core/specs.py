"""Facts about components that are known before loading, to refuse misfits and to plan memory. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

MAX_SIDE = 4096
"""Maximum side of an image in pixels."""
MAX_ROWS = 1024
"""Maximum images per forward pass."""
DECODE_PIXELS = 2**18
"""Maximum image pixels per decoder call: one image of 512 px, or as many small ones as suit a CPU cache."""

_SEPARATE = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# query, key, value and the feed-forward in one matrix, and their outputs in another, as in FLUX.2
_FUSED = ("to_qkv_mlp_proj", "attn.to_out")
_ATTENTION = _SEPARATE + _FUSED
_ATTENTION_ENDS = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = (
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
)

LORA_PRESETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention": _ATTENTION,
        "attention-mlp": _ATTENTION + _FEED_FORWARD,
        "self-attention": tuple(f"attn1.{end}" for end in _ATTENTION_ENDS),
        "cross-attention": tuple(f"attn2.{end}" for end in _ATTENTION_ENDS),
    }
)
"""Preset name -> suffixes of module names. `attention` is what published RL fine-tunes of FLUX adapt: the image and
text projections of the double-stream blocks and, by the same suffixes, to_q/k/v of the single-stream blocks. In FLUX.2
single-stream blocks fuse attention and feed-forward, and both fused matrices belong to `attention`. On SANA it is both
attentions of a block, which the last two name singly: the linear one among image tokens, and the one that attends to
the prompt."""


MapKind = Literal["two-time", "single-time", "velocity"]
"""What a network predicts at time t: the average velocity to any target time, that to 0, or the velocity at t."""


Kernel = tuple[str, tuple[tuple[str, object], ...]]
"""A stochasticizer by name, with its options."""


@dataclass(frozen=True)
class MapSpec:
    """Declared properties of a flow-map model.

    Attributes:
        anchors: `any` for two-time and velocity maps, `endpoint` for single-time maps.
        path: name of the probability path.
        resolution: side of the square image in pixels.
        default_steps: sampling steps of the deterministic sampler.
        default_grid: name or times of the grid that the model was distilled for.
        default_stochasticizer: what `auto` means for this model, as (name, options).
        default_recipe: name of the recipe under `configs/` that ships with the model; for a model of another package,
            the absolute path of the file.
        gpu_memory_gb: approximate GPU memory in units of 10^9 bytes; 0 for a model that runs on a CPU.
        kind: kind of map; None says what `anchors` says, a two-time or a single-time map.
    """

    anchors: Literal["endpoint", "any"]
    path: Literal["linear", "trig"]
    resolution: int
    default_steps: int
    default_grid: str | tuple[float, ...]
    default_stochasticizer: Kernel
    default_recipe: str
    gpu_memory_gb: float = 0.0
    kind: MapKind | None = None

    @property
    def map_name(self) -> str:
        """The kind of map, for people: `two-time`, `single-time` or `velocity`."""
        return self.kind or ("two-time" if self.anchors == "any" else "single-time")


@dataclass(frozen=True)
class Requirements:
    """What a stochasticizer requires of a flow map and of the grid.

    Attributes:
        anchors: `any` when it jumps to an interior time or needs the diagonal velocity.
        path: the only path it is defined on, or `any`.
        calls: network evaluations (NFE) of one transition.
        min_target_time: the transition is defined for target times strictly above this.
    """

    anchors: Literal["endpoint", "any"]
    path: Literal["linear", "any"]
    calls: int
    min_target_time: float


@dataclass(frozen=True)
class LinearModule:
    """One linear layer of a network.

    Attributes:
        name: its name in the state dict, without `.weight`.
        inputs: features in.
        outputs: features out.
        tokens: which tokens of a sample pass through it; `row` is one vector per sample, `none` a layer that is not
            used and therefore not adapted.
        source: layers of one block with the same source read the same tensor.
        bias: whether it has a bias; stated for second-time embedders, whose biases are trained.
    """

    name: str
    inputs: int
    outputs: int
    tokens: Literal["image", "text", "both", "row", "none"]
    source: str
    bias: bool = True


@dataclass(frozen=True)
class ActivationBytes:
    """Memory for one unit of work: numbers in the dtype of the network, and bytes that do not depend on the dtype."""

    numbers: float
    fixed: float = 0.0

    def size(self, number: int) -> float:
        """Bytes, for numbers of `number` bytes."""
        return self.numbers * number + self.fixed


@dataclass(frozen=True)
class Blocks:
    """Equal transformer blocks in a row, and the memory of one of them for each token and feature of the stream.

    Attributes:
        count: how many there are.
        kept: memory kept for the backward pass, without what a LoRA keeps.
        backward: additional memory while the backward pass of a block runs.
        forward: peak memory without gradients.
        forward_wide: added to `forward` when a LoRA adapts a layer four times as wide as the stream, in fp32.
        low_wide: the same for narrower dtypes.
    """

    count: int
    kept: ActivationBytes
    backward: ActivationBytes
    forward: ActivationBytes
    forward_wide: int = 0
    low_wide: int = 0


@dataclass(frozen=True)
class ModelGeometry:
    """A generator in numbers.

    Attributes:
        origin: where the numbers come from, for people.
        linears: every linear layer of the transformer.
        parameters: parameters of the transformer.
        width: width of its token stream.
        stream: which tokens the stream has.
        blocks: the kinds of its blocks, in the order in which they run.
        other_flops: floating-point operations of one call besides the linear layers: attention and convolutions.
        image_tokens: tokens of one image.
        text_tokens: text tokens of one prompt.
        conditioning: numbers that condition one sample.
        latent: numbers of one latent.
        resolution: side of the image in pixels.
        encoder_parameters: parameters of all text encoders together.
        decoder_parameters: parameters of the autoencoder.
        decoder: peak memory of decoding per pixel of the image.
        checkpointing: whether blocks are computed again in the backward pass.
        encoders_resident: whether the text encoders stay on the device of the transformer.
        decoder_tile: side of the tiles in pixels that images are decoded in; None decodes them whole.
        tables: numbers that are stored with the transformer but are not parameters, such as a table of positions.
        second_embedder: name of the second-time embedder in the state dict; empty for a family without one.
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
    decoder: ActivationBytes
    checkpointing: bool = False
    encoders_resident: bool = True
    decoder_tile: int | None = None
    tables: int = 0
    second_embedder: str = ""

    @property
    def tokens(self) -> Mapping[str, int]:
        """Tokens of one sample that a layer sees, by `LinearModule.tokens`."""
        both = self.image_tokens + self.text_tokens
        return {"image": self.image_tokens, "text": self.text_tokens, "both": both, "row": 1, "none": 0}

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


def expand_targets(targets: Iterable[str]) -> tuple[str, ...]:
    """Presets replaced by their suffixes, other entries kept; without repeats, in order."""
    expanded = (suffix for target in targets for suffix in LORA_PRESETS.get(target, (target,)))
    return tuple(dict.fromkeys(expanded))


def is_target(name: str, suffixes: Iterable[str]) -> bool:
    """Whether the name of a module equals one of the suffixes, or ends with a dot and one of them."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
