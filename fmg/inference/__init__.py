"""Drawing images from a model, a run or an artifact, with the same seeds on every backend.

Its names are looked up when they are first used: `fmg.inference.artifact` opens where there is no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmg.inference.generator import Generated, Generator
    from fmg.inference.target import Target, load, resolve_target

_HOMES = {
    "Generated": "fmg.inference.generator",
    "Generator": "fmg.inference.generator",
    "Target": "fmg.inference.target",
    "load": "fmg.inference.target",
    "resolve_target": "fmg.inference.target",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


__all__ = ["Generated", "Generator", "Target", "load", "resolve_target"]
