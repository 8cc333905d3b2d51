"""The value that a run starts from. Imports no torch, so that prompt files can be checked without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One entry of a prompt set. `metadata` follows GenEval (`include`: class, count, color, position)."""

    text: str
    tag: str
    metadata: Mapping[str, object]
