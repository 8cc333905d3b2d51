"""Turns pydantic's validation errors into one sentence that says what is wrong and one that says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from fmg.core.errors import suggestion

Location = tuple[str | int, ...]
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
        """The error to raise inside a validator; `first_problem` unpacks it again, below the validator's own place."""
        return PydanticCustomError(_CARRIER, "{what}", {"what": self.what, "fix": self.fix, "location": self.location})


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
        return Problem(location, f"{subject} has no {noun} '{path}'", suggestion(key, owner.model_fields))
    if first["type"] == "missing":
        return Problem(
            location,
            f"{subject} needs the {noun} '{path}'",
            f"Add {path}, for example on the command line or in the recipe; `fmg show` describes it",
        )
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if not path:
        return Problem(location, f"{subject}: {reason}", "Correct it; `fmg show` lists every option with its range")
    given = _shown(first["input"])
    what = f"{subject}: {noun} '{path}' {reason} (given: {given})"
    return Problem(location, what, _advice(owner, location))


def _owner(model: type[BaseModel], location: Sequence[str | int]) -> tuple[type[BaseModel], Location]:
    """The innermost model class on the way to `location`, and the location without pydantic's union labels."""
    owner, kept = model, list[str | int]()
    inside_field = False
    for part in location:
        if isinstance(part, int):
            kept.append(part)
            continue
        if inside_field:
            continue
        kept.append(part)
        info = owner.model_fields.get(part)
        annotation = None if info is None else info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            owner = annotation
        else:
            inside_field = True
    return owner, tuple(kept)


def _advice(owner: type[BaseModel], location: Location) -> str:
    info = owner.model_fields.get(str(next((p for p in reversed(location) if isinstance(p, str)), "")))
    if info is None or not info.description:
        return "Correct the value; `fmg show` lists every option with its range"
    return f"It means: {info.description.strip().rstrip('.')}"


def _shown(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def explain(error: ValidationError, model: type[BaseModel], subject: str) -> tuple[str, str]:
    """The first mistake of `error` as (what is wrong, what to do)."""
    problem = first_problem(error, model, subject)
    return problem.what, problem.fix
