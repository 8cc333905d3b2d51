"""What can be known of a component before it is loaded: used to refuse pairs that do not fit. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

MAX_SIDE = 4096
"""Pixels along the side of an image, at most."""
MAX_ROWS = 1024
"""Images of one network call, at most."""
DECODE_PIXELS = 2**18
"""Image pixels that one decoder call may make: one image of 512 px, or as many small ones as a CPU cache likes."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_ATTENTION_ENDS = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")

LORA_PRESETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention": _ATTENTION,
        "attention-mlp": _ATTENTION + _FEED_FORWARD,
        "self-attention": tuple(f"attn1.{end}" for end in _ATTENTION_ENDS),
        "cross-attention": tuple(f"attn2.{end}" for end in _ATTENTION_ENDS),
    }
)
"""Preset name -> suffixes of module names. `attention` is what published RL fine-tunes of FLUX adapt: the image and
text projections of the double-stream blocks and, by the same suffixes, to_q/k/v of the single-stream blocks. On SANA it
is both attentions of a block, which the last two name one by one: the linear one among image tokens, and the one that
looks at the prompt."""


@dataclass(frozen=True)
class MapSpec:
    """Declared properties of a flow-map model.

    Attributes:
        anchors: `any` for two-time maps, `endpoint` for single-time maps.
        path: name of the probability path.
        resolution: side of the square image in pixels.
        default_steps: network calls of the deterministic sampler.
        default_grid: name or times of the grid that the model was distilled for.
        default_stochasticizer: what `auto` means for this model, as (name, options).
        default_recipe: name of the recipe under `configs/` that the model ships; for a model of another package, the
            absolute path of the file.
        gpu_memory_gb: GPU memory that it takes, about, in units of 10^9 bytes; 0 for a model that runs on a CPU.
    """

    anchors: Literal["endpoint", "any"]
    path: Literal["linear", "trig"]
    resolution: int
    default_steps: int
    default_grid: str | tuple[float, ...]
    default_stochasticizer: tuple[str, tuple[tuple[str, object], ...]]
    default_recipe: str
    gpu_memory_gb: float = 0.0


@dataclass(frozen=True)
class Requirements:
    """What a stochasticizer asks of a flow map and of the grid.

    Attributes:
        anchors: `any` when it jumps to an interior time or needs the diagonal velocity.
        path: the only path it is defined on, or `any`.
        calls: network calls for one transition.
        min_target_time: the transition is defined for target times strictly above this.
    """

    anchors: Literal["endpoint", "any"]
    path: Literal["linear", "any"]
    calls: int
    min_target_time: float


def expand_targets(targets: Iterable[str]) -> tuple[str, ...]:
    """Presets replaced by their suffixes, other entries kept; without repeats, in order."""
    expanded = (suffix for target in targets for suffix in LORA_PRESETS.get(target, (target,)))
    return tuple(dict.fromkeys(expanded))


def is_target(name: str, suffixes: Iterable[str]) -> bool:
    """Whether the name of a module is, or ends with a dot and, one of the suffixes."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
