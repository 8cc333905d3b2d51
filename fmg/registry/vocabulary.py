"""Words of a recipe that later rooms define. They are looked up through the catalog, as components are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from fmg.registry.catalog import GRID_NAMES, GRID_RULE, LORA_PRESETS
from fmg.registry.registry import load


class _GridRule(Protocol):
    def __call__(self, spec: str | Sequence[float], steps: int, *, image_tokens: int | None) -> tuple[float, ...]: ...


class _GridNames(Protocol):
    def __call__(self) -> tuple[str, ...]: ...


def grid_names() -> tuple[str, ...]:
    """Names of the grids that follow a rule; a list of times needs no name."""
    return tuple(name for name in cast(_GridNames, load(GRID_NAMES))() if name != "explicit")


def grid_times(spec: str | Sequence[float], steps: int) -> tuple[float, ...] | None:
    """The times of a grid, or None when they depend on the model's image size (`flux-shift`).

    Raises:
        UsageError: when the grid does not exist for this number of steps, or the times do not fall from 1 to 0.
    """
    if spec == "flux-shift":
        return None
    return cast(_GridRule, load(GRID_RULE))(spec, steps, image_tokens=None)


def lora_presets() -> tuple[str, ...]:
    """Names of the presets of adapted modules."""
    return tuple(cast("Mapping[str, object]", load(LORA_PRESETS)))
