"""A recipe: one run, written down and validated. `fmg.registry.resolve` says where its values come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from pydantic import BaseModel, Field

from fmg.core.display import counted, html_text
from fmg.core.errors import python_call
from fmg.registry.document import Plain, render
from fmg.registry.kinds import registry_for
from fmg.registry.references import (
    ComponentRef,
    ModelRef,
    ObjectiveRef,
    OptimizerRef,
    PromptsRef,
    RewardRef,
    StochasticizerRef,
    WeightedRewardRef,
)
from fmg.registry.sections import EvalSection, LoraSection, RolloutSection, Section, TrainSection


class Recipe(Section):
    """Everything that determines a training run. Immutable and validated; components are resolved to typed configs.

    Example:
        >>> from fmg import Recipe
        >>> recipe = Recipe.default(model="meanflow-shapes", **{"train.iterations": 3})
        >>> recipe.with_(iterations=5, **{"objective.kl_beta": 0.01})
        Recipe(meanflow-shapes, asfmc, grpo, rewards: shapes, 5 iterations)
    """

    model: ModelRef
    stochasticizer: StochasticizerRef
    rewards: tuple[WeightedRewardRef, ...] = Field(min_length=1)
    objective: ObjectiveRef
    optimizer: OptimizerRef
    rollout: RolloutSection = RolloutSection()
    train: TrainSection = TrainSection()
    lora: LoraSection = LoraSection()
    prompts: PromptsRef
    eval: EvalSection

    @classmethod
    @python_call
    def default(cls, model: str | None = None, **overrides: object) -> Recipe:
        """The default recipe of a model with some values replaced.

        Args:
            model: name of a model; the embedded two-time model when None.
            overrides: dotted path of the recipe → value, as `**{"train.iterations": 3}`, or a flag of `fmg train` →
                value, as `iterations=3`.

        Raises:
            UsageError: unknown name or key, wrong type, value out of range.
            CompositionError: components that do not fit together.
        """
        from fmg.registry.resolve import resolve_arguments  # which imports this module

        return resolve_arguments(overrides if model is None else {"model": model, **overrides}).recipe

    @classmethod
    @python_call
    def from_yaml(cls, path: str | Path, *, allow_code: bool = False) -> Recipe:
        """The recipe in a file, over the default recipe of the model that it names. Errors as in `resolve`."""
        from fmg.registry.resolve import resolve  # which imports this module

        return resolve(Path(path), allow_code=allow_code).recipe

    @classmethod
    @python_call
    def of_run(cls, path: str | Path, *, allow_code: bool = False) -> Recipe:
        """The recipe in a run folder, `recipe.yaml`, by which the run was made. Errors as in `resolve`."""
        from fmg.registry.resolve import resolve_run  # which imports this module

        return resolve_run(path, allow_code=allow_code).recipe

    @python_call
    def with_(self, values: Mapping[str, object] | None = None, /, **overrides: object) -> Recipe:
        """This recipe with some values replaced; another component's name drops the old options.

        Args:
            values: as `overrides`, for keys that are no Python names.
            overrides: as in `default`: `recipe.with_(iterations=3, **{"lora.rank": 4})`.

        Raises:
            UsageError: unknown name or key, wrong type, value out of range.
            CompositionError: components that do not fit together.
        """
        from fmg.registry.resolve import override  # which imports this module

        return override(self, {**(values or {}), **overrides}).recipe

    def plain(self) -> dict[str, Plain]:
        """Nested plain values, every option stated."""
        return cast("dict[str, Plain]", self.model_dump(mode="json"))

    def to_yaml(self) -> str:
        """YAML 1.2 that `from_yaml` reads back to an equal recipe; relative prompt files are those beside its file."""
        return render(self.plain(), {})

    def notes(self) -> dict[str, str]:
        """What each value means, by dotted path (`optimizer.lr`, `rewards.0.weight`): to annotate a recipe with."""
        return dict(_notes(self, ""))

    def __repr__(self) -> str:
        rewards = " + ".join(ref.label if ref.weight == 1 else f"{ref.weight:g} {ref.label}" for ref in self.rewards)
        parts = (self.model.name, self.stochasticizer.name, self.objective.name, f"rewards: {rewards}")
        return f"Recipe({', '.join(parts)}, {counted(self.train.iterations, 'iteration')})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return html_text(repr(self), self.to_yaml())

    @property
    def measured_rewards(self) -> tuple[RewardRef, ...]:
        """What an evaluation measures: the trained rewards, then the held-out ones, each once."""
        by_label: dict[str, RewardRef] = {}
        for reward in (*self.rewards, *self.eval.rewards):
            by_label.setdefault(reward.label, reward)
        return tuple(by_label.values())


def _notes(section: BaseModel, path: str) -> Iterator[tuple[str, str]]:
    """Path and meaning of every value under `path`; what a component has is described by its config."""
    if isinstance(section, ComponentRef):
        yield f"{path}name", registry_for(section.kind).row(section.name).summary
        yield from _notes(section.config, path)
    for key, info in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(section, ComponentRef) and key in ComponentRef.model_fields:
            continue
        if isinstance(value, BaseModel):
            yield from _notes(value, f"{path}{key}.")
        elif isinstance(value, tuple) and value and all(isinstance(item, BaseModel) for item in value):
            for number, item in enumerate(value):
                yield from _notes(item, f"{path}{key}.{number}.")
        else:
            yield f"{path}{key}", info.description or ""
