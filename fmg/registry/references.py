"""References from a recipe to components: a name, and options validated by that component's config class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from fmg.core.errors import UsageError
from fmg.registry.config import ComponentConfig, ModelConfig, ObjectiveConfig, StochasticizerConfig
from fmg.registry.kinds import registry_for
from fmg.registry.validation import Problem, first_problem

PYTHON_REWARD, FUNCTION_REWARD = "python", "function"
_LABELS = {PYTHON_REWARD: "target", FUNCTION_REWARD: "function"}


class ComponentRef(BaseModel):
    """`{name: N, option: value, ...}`: the component `N` of one kind. `config` holds all its options, typed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: ClassVar[str]

    name: str
    config: SerializeAsAny[ComponentConfig]

    @model_validator(mode="before")
    @classmethod
    def _options_to_config(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"name": value}
        advice = f"Write {{name: NAME}}; `fmg list {cls.kind}` lists the names"
        if not isinstance(value, Mapping):
            what = f"The {cls.kind} must be a name or a mapping with a name (given: {value!r})"
            raise Problem((), what, advice).as_pydantic()
        own = {key: value[key] for key in cls.model_fields if key in value}
        name = own.get("name")
        if not isinstance(name, str):
            what = (
                f"The name of the {cls.kind} is missing"
                if name is None
                else f"The {cls.kind} has a name that is no text"
            )
            raise Problem(("name",) if "name" in own else (), what, advice).as_pydantic()
        if not isinstance(own.get("config"), ComponentConfig):
            options = {key: option for key, option in value.items() if key not in own or key == "config"}
            own["config"] = _validated(cls.kind, name, options, strict=info.mode == "json")
        return own

    @model_serializer(mode="plain")
    def _flatten(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in type(self).model_fields if key != "config"}
        return {**own, **self.config.model_dump(mode="json")}


def _validated(kind: str, name: str, options: Mapping[str, object], *, strict: bool) -> ComponentConfig:
    registry = registry_for(kind)
    try:
        config_class = registry.config_class(name)
    except UsageError as error:
        raise Problem(("name",), error.what, error.fix).as_pydantic() from None
    try:
        # strict JSON rules are those of YAML: a list is a tuple, but the text "1" is no number and true is no integer
        if strict:
            return config_class.model_validate_json(json.dumps(options), strict=True)
        return config_class.model_validate(dict(options))
    except ValidationError as error:
        raise first_problem(error, config_class, f"The {kind} '{name}'").as_pydantic() from None


class ModelRef(ComponentRef):
    """A model."""

    kind = "model"
    config: SerializeAsAny[ModelConfig]


class StochasticizerRef(ComponentRef):
    """A stochasticizer."""

    kind = "stochasticizer"
    config: SerializeAsAny[StochasticizerConfig]


class ObjectiveRef(ComponentRef):
    """An objective."""

    kind = "objective"
    config: SerializeAsAny[ObjectiveConfig]


class OptimizerRef(ComponentRef):
    """An optimizer."""

    kind = "optimizer"


class PromptsRef(ComponentRef):
    """A prompt set."""

    kind = "prompt-set"


class RewardRef(ComponentRef):
    """A reward."""

    kind = "reward"

    @property
    def label(self) -> str:
        """Its name in log keys: for a user's own function `module:function` or its name, else the registered name."""
        return cast(str, getattr(self.config, _LABELS[self.name])) if self.name in _LABELS else self.name


class WeightedRewardRef(RewardRef):
    """A reward and its weight in the sum that is maximised."""

    weight: float = Field(1.0, description="factor in the weighted sum; negative to minimise")
