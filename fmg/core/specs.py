"""What can be known of a component before it is loaded: used to refuse pairs that do not fit. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_SIDE = 4096
"""Pixels along the side of an image, at most."""
MAX_ROWS = 1024
"""Images of one network call, at most."""
DECODE_PIXELS = 2**18
"""Image pixels that one decoder call may make: one image of 512 px, or as many small ones as a CPU cache likes."""


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
