"""JSON to frozen dataclasses by their annotations: every key must be known, and present unless it has a default.

Standard library only, because artifacts are read where there is no pydantic (docs/adr/0012).
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class DecodeError(ValueError):
    """A value that is not what the annotation says; the message begins with its location."""


def decode(cls: type[T], value: object) -> T:
    """An instance of the dataclass `cls` from parsed JSON.

    Known annotations are dataclasses, `str`, `int`, `float` (finite), `bool`, `None`, `object` (any JSON), `Literal`,
    unions, `tuple[X, ...]` and `Mapping[str, X]`.

    Raises:
        DecodeError: a key is missing or unknown, or a value has the wrong type.
    """
    decoded: T = _dataclass(cls, value, "")
    return decoded


def _value(annotation: Any, value: object, where: str) -> Any:
    origin = get_origin(annotation)
    if annotation is object:
        return value
    if dataclasses.is_dataclass(annotation):
        return _dataclass(annotation, value, where)
    if origin is Literal:
        if value not in get_args(annotation):
            raise DecodeError(
                f"{where} is {value!r:.60} instead of one of {', '.join(map(repr, get_args(annotation)))}"
            )
        return value
    if origin is Union or origin is types.UnionType:
        return _union(annotation, value, where)
    if origin is tuple:
        entries = _typed(list, value, where)
        return tuple(_value(get_args(annotation)[0], entry, f"{where}[{i}]") for i, entry in enumerate(entries))
    if origin is not None and issubclass(origin, Mapping):
        pairs = _typed(dict, value, where)
        return {key: _value(get_args(annotation)[1], entry, f"{where}.{key}") for key, entry in pairs.items()}
    return _scalar(annotation, value, where)


def _dataclass(cls: Any, value: object, where: str) -> Any:
    given = _typed(dict, value, where or "it")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(given.keys() - fields.keys()):
        raise DecodeError(f"{_at(where, unknown[0])} is not a known key")
    for name, field in fields.items():
        if name not in given and field.default is dataclasses.MISSING:
            raise DecodeError(f"{_at(where, name)} is missing")
    try:
        return cls(**{name: _value(hints[name], given[name], _at(where, name)) for name in fields if name in given})
    except DecodeError:
        raise
    except ValueError as error:
        raise DecodeError(f"{where or 'it'} is invalid: {error}") from None


def _union(annotation: Any, value: object, where: str) -> Any:
    if value is None and types.NoneType in get_args(annotation):
        return None
    error: DecodeError | None = None
    for option in get_args(annotation):
        if option is types.NoneType:
            continue
        try:
            return _value(option, value, where)
        except DecodeError as failed:
            error = error or failed
    assert error is not None
    raise error


def _scalar(annotation: Any, value: object, where: str) -> Any:
    if annotation is float:
        try:
            number = _typed(float, float(value) if type(value) is int else value, where)
        except OverflowError:
            raise DecodeError(f"{where} is an integer too large for a float") from None
        if not math.isfinite(number):
            raise DecodeError(f"{where} is {number}, which is not a finite number")
        return number
    # type() rather than isinstance(), because True is an int
    if type(value) is not annotation:
        raise DecodeError(f"{where} is {value!r:.60} instead of {annotation.__name__}")
    return value


def _typed(cls: type[T], value: object, where: str) -> T:
    if not isinstance(value, cls):
        raise DecodeError(f"{where} is {value!r:.40} instead of {cls.__name__}")
    return value


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
