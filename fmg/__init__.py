"""Flow-Map GRPO: reinforcement learning for few-step flow-map image generators.

Importing this package imports nothing else: names are looked up on first use, and torch is imported by the calls that
need it. docs/python.md shows them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fmg.version import __version__, is_runtime

if TYPE_CHECKING:
    from fmg.core.errors import FmgError, UsageError
    from fmg.eval.evaluate import evaluate
    from fmg.export.artifact import export_artifact
    from fmg.export.diffusers import export_diffusers
    from fmg.export.push import push
    from fmg.export.verify import verify
    from fmg.inference import Generator, load
    from fmg.inference.pipeline import FlowMapPipeline
    from fmg.recipe import Recipe, resolve
    from fmg.training.api import resume, train

_HOMES = {
    "FlowMapPipeline": "fmg.inference.pipeline",
    "FmgError": "fmg.core.errors",
    "Generator": "fmg.inference",
    "Recipe": "fmg.recipe",
    "UsageError": "fmg.core.errors",
    "evaluate": "fmg.eval.evaluate",
    "export_artifact": "fmg.export.artifact",
    "export_diffusers": "fmg.export.diffusers",
    "load": "fmg.inference",
    "push": "fmg.export.push",
    "resolve": "fmg.recipe",
    "resume": "fmg.training.api",
    "train": "fmg.training.api",
    "verify": "fmg.export.verify",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError:
        from fmg.core.runtime import beyond_runtime

        if not is_runtime():
            raise
        raise beyond_runtime(f"fmg.{name}") from None


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "FlowMapPipeline",
    "FmgError",
    "Generator",
    "Recipe",
    "UsageError",
    "__version__",
    "evaluate",
    "export_artifact",
    "export_diffusers",
    "load",
    "push",
    "resolve",
    "resume",
    "train",
    "verify",
]
