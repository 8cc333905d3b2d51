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
    trackers,
)
from fmg.registry.config import ComponentConfig, ModelConfig, ObjectiveConfig, StochasticizerConfig, TrackerConfig
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
    "TrackerConfig",
    "backends",
    "feature_extractors",
    "models",
    "objectives",
    "optimizers",
    "prompt_sets",
    "registry_for",
    "rewards",
    "stochasticizers",
    "trackers",
]
