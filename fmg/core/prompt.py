"""The value that a run starts from. Imports no torch, so that prompt files can be checked without it."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One entry of a prompt set. `metadata` follows GenEval (`include`: class, count, color, position)."""

    text: str
    tag: str
    metadata: Mapping[str, object]


# letters and symbols of Unicode that show nothing: fillers of Hangul and the empty Braille cell
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: it is empty, or white space, control and zero-width characters alone."""
    return all(c.isspace() or c in _FILLERS or unicodedata.category(c) in ("Cc", "Cf") for c in text)
