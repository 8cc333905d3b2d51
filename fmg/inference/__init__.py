"""Generates images from a model, a run or an artifact, with the same seeds on every backend.

Names load on first use, so that an artifact can be sampled without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmg.inference.generator import Generated, Generator
    from fmg.inference.loading import load
    from fmg.inference.target import Target, resolve_target

_HOMES = {
    "Generated": "generator",
    "Generator": "generator",
    "Target": "target",
    "load": "loading",
    "resolve_target": "target",
}

__all__ = ["Generated", "Generator", "Target", "load", "resolve_target"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fmg.inference' has no attribute '{name}'")
    return getattr(import_module(f"fmg.inference.{_HOMES[name]}"), name)
