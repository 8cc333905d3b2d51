"""The JSON schema of a recipe file, for editors: derived from the recipe sections and the registry. Imports no torch.

A file is one layer over the model's own recipe. So no key is required, and defaults are not stated, because the model's
recipe may have other values. Entries of lists (`rewards`, `trackers`) are complete in themselves and have both. The
dialect is draft 7, which the YAML servers of all editors support.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fmg.core.prompt import PROMPT_FILE_SUFFIXES
from fmg.recipe.layers import AUTO, COMPONENTS, EXTENDS
from fmg.recipe.sections import PYTHON_REWARD, ComponentRef, RecipeFields
from fmg.registry.catalog import ROWS, registry_for
from fmg.registry.config import ComponentConfig
from fmg.registry.registry import Registry

Schema = dict[str, Any]

_DIALECT = "http://json-schema.org/draft-07/schema#"
_ABOUT = (
    "A recipe of fmg. What it leaves out comes from the recipe of its model; `fmg train --config FILE --dry-run` prints"
    " every value with its source."
)
_OF_SCHEMAS_BY_NAME, _OF_VALUES = ("properties", "$defs"), ("default", "enum", "const")
_ALONE = ("title",)
_LAYERED = ("title", "required", "default")
"""Keywords of pydantic's schema to omit, in list entries and in values that a lower layer completes."""

_EXTENDS: Schema = {
    "type": "string",
    "minLength": 1,
    "description": "the recipe below this one: a shipped recipe, or a file relative to this one",
}
_FUNCTION: Schema = {"pattern": f"^{PYTHON_REWARD}:", "description": "your own function: python:module:function"}
_FILE = {"pattern": rf"[/\\]|({'|'.join(map(re.escape, PROMPT_FILE_SUFFIXES))})$", "description": "a file of prompts"}
_SPECIAL = {
    "stochasticizer": [{"const": AUTO, "description": "the default of the model"}],
    "reward": [_FUNCTION],
}
"""Component names that are not in the registry."""
_ALONE_SPECIAL = {"prompt-set": [_FILE]}
"""Other values than a name that can replace a component."""


def installed(registry: Registry[Any]) -> list[str]:
    """The components of this package and of all other packages that register some."""
    return registry.names()


def built_in(registry: Registry[Any]) -> list[str]:
    """The components of this package."""
    return sorted(row.name for row in ROWS if row.kind == registry.kind)


def recipe_schema(names: Callable[[Registry[Any]], Sequence[str]] = installed) -> Schema:
    """The schema of a recipe file with the components that `names` finds in each registry."""
    layered = _cleaned(RecipeFields.model_json_schema(), _LAYERED)
    definitions: Schema = layered.pop("$defs")
    references = [cls for cls in _subclasses(ComponentRef) if cls.__name__ in definitions]
    own = {cls: _own(definitions[cls.__name__]) for cls in references}
    for kind in dict.fromkeys(cls.kind for cls in references):
        alike = [cls for cls in references if cls.kind == kind]
        # keys that only some references of the kind have, such as the weight of a reward that is trained
        keys = sorted({key for cls in alike for key in own[cls]})
        component = _Component(kind, names(registry_for(kind)), keys, definitions)
        for cls in alike:
            about = definitions[cls.__name__]["description"]
            found = component.schema(dict.fromkeys(keys, False) | own[cls])
            definitions[cls.__name__] = {"description": about, **found}
    lists = ((layered, "rewards"), (layered, "trackers"), (definitions["EvalSection"], "rewards"))
    for section, place in lists:
        # one component may stand for a list
        several = section["properties"][place]
        about = {"description": several.pop("description")}
        section["properties"][place] = about | {"if": {"type": "array"}, "then": several, "else": several["items"]}
    layered["properties"] = {EXTENDS: _EXTENDS, **layered["properties"]}
    text = json.dumps([layered, definitions])
    used = {name: found for name, found in definitions.items() if f'"#/$defs/{name}"' in text}
    return {"$schema": _DIALECT, "title": "fmg recipe", **layered, "description": _ABOUT, "$defs": used}


def _own(reference: Schema) -> Schema:
    return {key: found for key, found in reference["properties"].items() if key not in ComponentRef.model_fields}


class _Component:
    """The components of one kind, each with its options as a definition `KIND.NAME`.

    Args:
        kind: kind of the components.
        names: their names.
        keys: keys of a mapping in a recipe that are neither the name nor an option.
        definitions: receives the options.
    """

    def __init__(self, kind: str, names: Sequence[str], keys: Sequence[str], definitions: Schema) -> None:
        registry = registry_for(kind)
        self._layered = kind in COMPONENTS.values()
        self._kind, self._keys = kind, keys
        self._known: Schema = {"enum": [*names], "enumDescriptions": [registry.row(name).summary for name in names]}
        by_config: defaultdict[type[ComponentConfig], list[str]] = defaultdict(list)
        for name in names:
            by_config[registry.config_class(name)].append(name)
        self._rules: list[Schema] = []
        every: defaultdict[str, list[Schema]] = defaultdict(list)
        for config, called in by_config.items():
            place = f"{kind}.{called[0]}"
            found = config.model_json_schema(ref_template=f"#/$defs/{place}.{{model}}")
            found = _cleaned(found, _LAYERED if self._layered else _ALONE)
            definitions |= {f"{place}.{name}": nested for name, nested in found.pop("$defs", {}).items()}
            options = found["properties"]
            definitions[place] = self._closed(found)
            self._rules.append(_rule({"enum": called}, {"$ref": f"#/$defs/{place}"}))
            if PYTHON_REWARD in called:
                rest = {key: option for key, option in options.items() if key != "target"}
                self._rules.append(_rule(_FUNCTION, self._closed({"properties": rest})))
            for option, schema in options.items():
                if schema not in every[option]:
                    every[option].append(schema)
        if self._layered:
            # without a name, the component that the model's own recipe names
            merged = {option: found[0] if len(found) == 1 else {"anyOf": found} for option, found in every.items()}
            unnamed = {"properties": {"name": {"const": AUTO}}}
            self._rules.append({"if": unnamed, "then": self._closed({"properties": merged})})

    def schema(self, own: Schema) -> Schema:
        """A plain name, or a mapping with `own` keys and the options of the named component."""
        special = _SPECIAL.get(self._kind, [])
        name: Schema = {"anyOf": [self._known, *special]} if special else self._known
        name = {"description": f"the {self._kind}; `fmg list {self._kind}` describes them", **name}
        mapping: Schema = {"type": "object", "properties": {"name": name, **own}, "allOf": self._rules}
        if not self._layered:
            mapping["required"] = ["name"]
        short = [self._known, *special, *_ALONE_SPECIAL.get(self._kind, [])]
        return {"anyOf": [*({"type": "string", **one} for one in short), mapping]}

    def _closed(self, options: Schema) -> Schema:
        """A mapping with these options, and no others."""
        properties = dict.fromkeys(("name", *self._keys), True) | options["properties"]
        return {**options, "properties": properties, "additionalProperties": False}


def _rule(name: Schema, options: Schema) -> Schema:
    return {"if": {"properties": {"name": name}, "required": ["name"]}, "then": options}


def _cleaned(schema: Any, without: Sequence[str]) -> Any:
    """A pydantic schema in draft 7, without some keywords."""
    if isinstance(schema, list):
        return [_cleaned(item, without) for item in schema]
    if not isinstance(schema, dict):
        return schema
    cleaned: Schema = {}
    for keyword, value in schema.items():
        if keyword in _OF_SCHEMAS_BY_NAME:
            cleaned[keyword] = {name: _cleaned(child, without) for name, child in value.items()}
        elif keyword in _OF_VALUES:
            cleaned[keyword] = value
        elif keyword not in without:
            cleaned["items" if keyword == "prefixItems" else keyword] = _cleaned(value, without)
    return {keyword: value for keyword, value in cleaned.items() if keyword not in without}


def _subclasses(cls: type[ComponentRef]) -> Iterator[type[ComponentRef]]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)
