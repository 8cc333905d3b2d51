"""Components by name. Importing this package does not import torch."""

from __future__ import annotations

from fmg.registry.catalog import (
    backends,
    feature_extractors,
    models,
    objectives,
    optimizers,
    prompt_sets,
    registry_for,
    rewards,
    stochasticizers,
)
from fmg.registry.config import ComponentConfig, ModelConfig, ObjectiveConfig, StochasticizerConfig
from fmg.registry.registry import Description, FieldInfo, Registry, Row

__all__ = [
    "ComponentConfig",
    "Description",
    "FieldInfo",
    "ModelConfig",
    "ObjectiveConfig",
    "Registry",
    "Row",
    "StochasticizerConfig",
    "backends",
    "feature_extractors",
    "models",
    "objectives",
    "optimizers",
    "prompt_sets",
    "registry_for",
    "rewards",
    "stochasticizers",
]
