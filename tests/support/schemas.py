"""Validates the output of commands against the published schemas."""

from __future__ import annotations

import json
from pathlib import Path

from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schemas"


def check(value: object, schema: str) -> None:
    """Validates against `docs/schemas/<schema>.schema.json`, which has to be a valid schema itself."""
    document = json.loads((SCHEMAS / f"{schema}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(document)
    Draft202012Validator(document).validate(value)
