"""Protobuf's text format, in which Triton reads the configuration of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_WIDTH = 120


class Word(str):
    """A value of an enumeration, which protobuf's text format writes without quotes."""


def pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format: a mapping is a message, and a list repeats its field."""
    return "".join(_fields(message, indent))


def _fields(message: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, list) and not any(isinstance(entry, Mapping) for entry in value):
            yield f"{indent}{name}: [{', '.join(map(_scalar, value))}]\n"
            continue
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, Mapping):
                yield f"{indent}{name}: {_scalar(entry)}\n"
                continue
            inner = pbtxt(entry, indent + "  ")
            lines = inner.split("\n")[:-1]
            short = " ".join([f"{indent}{name} {{", *(line.strip() for line in lines), "}"])
            yield f"{short}\n" if len(short) <= _WIDTH else f"{indent}{name} {{\n{inner}{indent}}}\n"


def _scalar(value: object) -> str:
    if isinstance(value, Word):
        return str(value)
    return json.dumps(value, ensure_ascii=False)
