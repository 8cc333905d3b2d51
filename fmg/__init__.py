"""Flow-Map GRPO: reinforcement learning for few-step flow-map image generators.

Importing this package imports nothing else; its names are looked up when they are first used, and torch is imported by
the calls that need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fmg.version import __version__

if TYPE_CHECKING:
    from fmg.eval.evaluate import evaluate
    from fmg.inference import Generator, load
    from fmg.inference.pipeline import FlowMapPipeline
    from fmg.registry.recipe import Recipe
    from fmg.registry.resolve import resolve
    from fmg.training.api import train

_HOMES = {
    "FlowMapPipeline": "fmg.inference.pipeline",
    "Generator": "fmg.inference",
    "Recipe": "fmg.registry.recipe",
    "evaluate": "fmg.eval.evaluate",
    "load": "fmg.inference",
    "resolve": "fmg.registry.resolve",
    "train": "fmg.training.api",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = ["FlowMapPipeline", "Generator", "Recipe", "__version__", "evaluate", "load", "resolve", "train"]
