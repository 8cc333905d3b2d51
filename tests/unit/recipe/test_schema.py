"""The schema of recipe files accepts what a recipe may say and refuses the usual mistakes, for every component."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError
from pydantic import Field
from pydantic import ValidationError as PydanticError
from ruamel.yaml import YAML

from fmg.core.errors import UsageError
from fmg.recipe import config_path, configs_folder, recipe_names, resolve
from fmg.recipe.layers import COMPONENTS, EXTENDS
from fmg.recipe.recipe import editor_line
from fmg.recipe.schema import built_in, installed, recipe_schema
from fmg.recipe.sections import RecipeFields
from fmg.registry import ComponentConfig, registry_for, rewards
from tests.support.cli import fmg

LISTS = {"rewards": "reward", "trackers": "tracker"}
PLACES = {**COMPONENTS, **LISTS}
"""The components of a recipe, and their kind."""
CASES = [(place, name) for place, kind in PLACES.items() for name in built_in(registry_for(kind))]


@pytest.fixture(scope="module")
def validator() -> Draft7Validator:
    schema = recipe_schema(built_in)
    Draft7Validator.check_schema(schema)
    return Draft7Validator(schema)


def messages(validator: Draft7Validator, recipe: object) -> list[str]:
    """What is wrong; of alternatives, with those that have the right type, as editors choose."""

    def causes(error: ValidationError) -> Iterator[str]:
        if error.validator != "anyOf":
            yield error.message
            return
        alternatives: dict[object, list[ValidationError]] = {}
        for cause in error.context or ():
            alternatives.setdefault(cause.schema_path[0], []).append(cause)
        of_type = [
            found for found in alternatives.values() if not any(e.validator == "type" and not e.path for e in found)
        ]
        for found in of_type or alternatives.values():
            for cause in found:
                yield from causes(cause)

    return [message for error in validator.iter_errors(recipe) for message in causes(error)]


def test_the_shipped_file_is_current() -> None:
    shipped = json.loads((configs_folder() / "recipe.schema.json").read_text(encoding="utf-8"))
    assert shipped == recipe_schema(built_in), "Run: fmg schema --built-in > configs/recipe.schema.json"


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_names_the_schema_and_fits_it(name: str, validator: Draft7Validator) -> None:
    text = config_path(name).read_text(encoding="utf-8")
    assert text.startswith(f"{editor_line(name)}\n")
    assert messages(validator, YAML(typ="safe", pure=True).load(text)) == []
    # as `fmg init` and a run folder write it
    assert messages(validator, resolve(name).recipe.plain()) == []


def test_every_section_is_in_it_with_a_description_of_each_value() -> None:
    schema = recipe_schema(built_in)
    assert schema["properties"].keys() == {EXTENDS, *RecipeFields.model_fields}

    def described(found: Any) -> bool:
        # what is merely allowed is described where a component is referred to
        if isinstance(found, bool) or "description" in found:
            return True
        return "$ref" in found and described(schema["$defs"][found["$ref"].removeprefix("#/$defs/")])

    values = [schema, *schema["$defs"].values()]
    assert [
        name for value in values for name, found in value.get("properties", {}).items() if not described(found)
    ] == []


@pytest.mark.parametrize(("place", "name"), CASES)
def test_each_component_has_its_own_options_and_no_others(place: str, name: str, validator: Draft7Validator) -> None:
    registry = registry_for(PLACES[place])
    config = registry.config_class(name)
    try:
        given: dict[str, object] = config().model_dump(mode="json")
    except PydanticError:
        # options without a default, which only entries of lists must state
        given = {}

    def said(more: dict[str, object]) -> list[str]:
        section: object = {"name": name, **given, **more}
        found = messages(validator, {place: [section] if place in LISTS else section})
        return [text for text in found if given or place not in LISTS or "is a required property" not in text]

    assert said({}) == []
    assert said({"no_such_option": 1}) == [unexpected("no_such_option")]
    others = {key for other in built_in(registry) for key in registry.config_class(other).model_fields}
    for option in others - config.model_fields.keys():
        assert said({option: None}) == [unexpected(option)]


def unexpected(key: str) -> str:
    return f"Additional properties are not allowed ('{key}' was unexpected)"


MISTAKES: dict[str, tuple[dict[str, object], str]] = {
    "an unknown section": ({"optimiser": {"lr": 1e-3}}, "'optimiser' was unexpected"),
    "an unknown key": ({"train": {"iteration": 3}}, "'iteration' was unexpected"),
    "an unknown key of a nested section": ({"rollout": {"branch": {"step": "first"}}}, "'step' was unexpected"),
    "text for a number": ({"optimizer": {"name": "adamw", "lr": "high"}}, "'high' is not of type 'number'"),
    "a number for a choice": ({"train": {"dtype": 16}}, "16 is not one of ['fp32', 'bf16']"),
    "out of range": ({"rollout": {"group_size": 1}}, "1 is less than the minimum of 2"),
    "an unknown component": ({"optimizer": {"name": "adam"}}, "'adam' is not one of"),
    "an unknown name alone": ({"objective": "grop"}, "'grop' is not one of"),
    "an option of another component": ({"optimizer": {"name": "adamw", "momentum": 0.9}}, "'momentum' was unexpected"),
    "an option of no component": ({"optimizer": {"speed": 1}}, "'speed' was unexpected"),
    "a reward without a name": ({"rewards": [{"weight": 1.0}]}, "'name' is a required property"),
    "a reward without what it needs": ({"rewards": [{"name": "python"}]}, "'target' is a required property"),
    "a weight of what is only measured": (
        {"eval": {"rewards": [{"name": "shapes", "weight": 1.0}]}},
        "False schema does not allow 1.0",
    ),
    "an unknown grid": ({"rollout": {"grid": "unifrom"}}, "'unifrom' is not one of"),
    "an unknown preset": ({"lora": {"targets": "mlp"}}, "'mlp' is not one of"),
    "an unknown device": ({"train": {"device": "gpu"}}, "'gpu' does not match"),
    "an unknown schedule": ({"train": {"lr_schedule": "cosin"}}, "'cosin' is not one of"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_as_fmg_refuses_it(mistake: str, validator: Draft7Validator) -> None:
    recipe, message = MISTAKES[mistake]
    assert any(message in text for text in messages(validator, recipe)), messages(validator, recipe)
    sets = [f"{place}={json.dumps(value)}" for place, value in recipe.items()]
    with pytest.raises(UsageError):
        resolve(None, {}, sets)


SHORTHAND: list[dict[str, object]] = [
    {"model": "scm-shapes", "stochasticizer": "auto", "optimizer": "sgd"},
    {"optimizer": {"lr": 1e-3}, "rollout": {"grid": [1, 0.5, 0.25, 0.125, 0]}, "lora": {"targets": ["to_q"]}},
    {"stochasticizer": {"name": "auto", "gap": 0.02}},
    {"rewards": "shapes"},
    {"rewards": {"name": "shapes", "score": "strict"}, "eval": {"rewards": "shapes-quality"}},
    {"rewards": ["python:json:dumps", {"name": "python:json:dumps", "weight": -1}]},
    {"prompts": "mine.txt", "eval": {"prompts": "folder/held.jsonl"}},
    {"train": {"device": "cuda:1", "ema_decay": None}},
]


@pytest.mark.parametrize("recipe", SHORTHAND, ids=str)
def test_shorthand_is_no_mistake(recipe: dict[str, object], validator: Draft7Validator) -> None:
    assert messages(validator, recipe) == []


class LimitedConfig(ComponentConfig):
    limit: int = Field(default=3, description="for tests")


def test_components_of_other_packages_are_in_it_and_not_in_the_shipped_file() -> None:
    rewards.add("schema-only", f"{__name__}:LimitedConfig", f"{__name__}:none", "a reward of another package")
    everything, own = (Draft7Validator(recipe_schema(names)) for names in (installed, built_in))
    recipe = {"rewards": [{"name": "schema-only", "limit": 4}]}
    assert messages(everything, recipe) == []
    assert messages(own, recipe)
    assert messages(everything, {"rewards": [{"name": "schema-only", "limits": 4}]})


def test_the_command_prints_it() -> None:
    done = fmg("schema", "--built-in")
    assert json.loads(done.stdout) == recipe_schema(built_in)
