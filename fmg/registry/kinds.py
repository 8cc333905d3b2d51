"""The registries, one per kind of component."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fmg.core.errors import UsageError, suggestion
from fmg.registry.catalog import ROWS
from fmg.registry.config import ComponentConfig, ModelConfig, ObjectiveConfig, StochasticizerConfig
from fmg.registry.registry import Registry, Row

if TYPE_CHECKING:
    from fmg.core.backends import BackendSource
    from fmg.core.protocols import (
        FeatureExtractor,
        ModelSource,
        Objective,
        OptimizerFactory,
        PromptSet,
        Reward,
        Stochasticizer,
    )


def _rows(kind: str) -> tuple[Row, ...]:
    return tuple(row for row in ROWS if row.kind == kind)


models: Registry[ModelSource] = Registry("model", "models", _rows("model"), ModelConfig)
stochasticizers: Registry[Stochasticizer] = Registry(
    "stochasticizer", "stochasticizers", _rows("stochasticizer"), StochasticizerConfig
)
rewards: Registry[Reward] = Registry("reward", "rewards", _rows("reward"), ComponentConfig)
objectives: Registry[Objective] = Registry("objective", "objectives", _rows("objective"), ObjectiveConfig)
optimizers: Registry[OptimizerFactory] = Registry("optimizer", "optimizers", _rows("optimizer"), ComponentConfig)
prompt_sets: Registry[PromptSet] = Registry("prompt-set", "prompt-sets", _rows("prompt-set"), ComponentConfig)
backends: Registry[BackendSource] = Registry("backend", "backends", _rows("backend"), ComponentConfig)
feature_extractors: Registry[FeatureExtractor] = Registry(
    "feature-extractor", "feature-extractors", _rows("feature-extractor"), ComponentConfig
)

REGISTRIES: tuple[Registry[Any], ...] = (
    models,
    stochasticizers,
    rewards,
    objectives,
    optimizers,
    prompt_sets,
    backends,
    feature_extractors,
)


def registry_for(kind: str) -> Registry[Any]:
    """The registry of a kind named in singular or plural (`reward`, `rewards`, `prompt-set`, `prompt_sets`).

    Raises:
        UsageError: for another kind, with a suggestion and the list.
    """
    wanted = kind.strip().lower().replace("_", "-")
    for registry in REGISTRIES:
        if wanted in (registry.kind, registry.plural):
            return registry
    raise UsageError(
        f"There is no kind of component named '{kind}'", suggestion(wanted, [r.plural for r in REGISTRIES])
    )


def registry_of(name: str) -> Registry[Any]:
    """The registry that has a component called `name`.

    Raises:
        UsageError: none has, or several have.
    """
    having = [registry for registry in REGISTRIES if name in registry.names()]
    if len(having) == 1:
        return having[0]
    if having:
        kinds = " and ".join(registry.kind for registry in having)
        raise UsageError(f"'{name}' is the name of a {kinds}", f"Name the kind: fmg show {having[0].kind} {name}.")
    wanted = name.strip().lower().replace("_", "-")
    if wanted in {word for registry in REGISTRIES for word in (registry.kind, registry.plural)}:
        raise UsageError(f"'{name}' is a kind of component", f"Add a name; `fmg list {name}` prints them.")
    known = [known for registry in REGISTRIES for known in registry.names()]
    raise UsageError(f"There is no component named '{name}'", suggestion(name, known))
