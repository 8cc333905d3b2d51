"""Turns pydantic's validation errors into a sentence on what is wrong and one on what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from fmg.core.errors import suggestion

M = TypeVar("M", bound=BaseModel)
Location = tuple[str | int, ...]
_PYDANTIC_SUBJECT = re.compile(r"^(Input|Value|Tuple|List|String|Dictionary) should ")
_CARRIER = "fmg_problem"


@dataclass(frozen=True)
class Problem:
    """One mistake in a tree of values.

    Attributes:
        location: keys and list positions from the root of the validated value to the mistake.
        what: what is wrong.
        fix: what to do.
    """

    location: Location
    what: str
    fix: str

    def as_pydantic(self) -> PydanticCustomError:
        """The error to raise inside a validator; `first_problem` unpacks it below the validator's own location."""
        return PydanticCustomError(_CARRIER, "{what}", {"what": self.what, "fix": self.fix, "location": self.location})


def validate_strictly(model: type[M], value: object) -> M:
    """`value` validated by the rules of YAML: a list can be a tuple, but neither the text "1" nor true is a number.

    Pydantic's strict mode applies these rules only to JSON texts; for Python values it refuses a list for a tuple. So
    the value is passed through JSON.

    Raises:
        ValidationError: it does not fit.
    """
    return model.model_validate_json(json.dumps(value), strict=True)


def first_problem(error: ValidationError, model: type[BaseModel], subject: str, noun: str = "option") -> Problem:
    """The first mistake that pydantic found.

    Args:
        error: raised while validating `model`.
        model: gives the known names for a suggestion.
        subject: what `model` describes, for example `objective 'grpo'`.
        noun: what its fields are called.
    """
    first = error.errors(include_url=False)[0]
    context: dict[str, Any] = first.get("ctx", {})
    if first["type"] == _CARRIER:
        return Problem((*first["loc"], *context["location"]), context["what"], context["fix"])
    owner, location = _owner(model, first["loc"])
    path = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        return Problem(location, f"{subject} has no {noun} '{path}'", _instead_of(key, owner, path.removesuffix(key)))
    if first["type"] == "missing":
        return Problem(location, f"{subject} needs the {noun} '{path}'", _advice(owner, location, f"Give '{path}'"))
    reason = _PYDANTIC_SUBJECT.sub("must ", first["msg"].removeprefix("Value error, "))
    if first["type"] == "string_pattern_mismatch":
        reason = "must have the right form"
    if not path:
        return Problem(location, f"{subject}: {reason}", "Change one of the values; `fmg show` describes every option")
    link = " " if reason.startswith("must ") else ": "
    what = f"{subject}: {noun} '{path}'{link}{reason} (given: {_shown(first['input'])})"
    return Problem(location, what, _advice(owner, location, "Correct the value"))


def _instead_of(key: str, owner: type[BaseModel], inside: str) -> str:
    """The paths of `key` in sections of `owner`, whose own path is `inside`; if no section has it, the known names."""
    sections = {name: field.annotation for name, field in owner.model_fields.items()}
    paths = [
        f"'{inside}{name}.{key}'"
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, BaseModel) and key in section.model_fields
    ]
    return f"Did you mean {' or '.join(paths)}?" if paths else suggestion(key, owner.model_fields)


def _owner(model: type[BaseModel], location: Sequence[str | int]) -> tuple[type[BaseModel], Location]:
    """The innermost model class on the way to `location`, and the location without pydantic's union labels."""
    owner: type[BaseModel] | None = model
    innermost, kept = model, list[str | int]()
    for part in location:
        if isinstance(part, int):
            kept.append(part)
        elif owner is not None:
            kept.append(part)
            info = owner.model_fields.get(part)
            owner = None if info is None else _model_in(info.annotation)
            innermost = owner or innermost
    return innermost, tuple(kept)


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _model_in(argument))), None)


def _advice(owner: type[BaseModel], location: Location, lead: str) -> str:
    name = next((part for part in reversed(location) if isinstance(part, str)), "")
    info = owner.model_fields.get(name)
    return f"{lead}: {info.description.strip()}" if info is not None and info.description else lead


def _shown(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
