"""The text that a prompt asks for, and how far a reading is from it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fmg.core.errors import MissingDependencyError, UsageError
from fmg.version import install_line

INSTALL_OCR = install_line("ocr")
_ANY_PAIR = re.compile('["“”„]([^"“”„]*)["“”„]')
# A straight quote after a digit opens nothing: it is an inch mark. The first quote that opens decides which form it is.
_QUOTED = re.compile(
    r"""
      “([^“”]*)”                                     # may hold straight quotes
    | „([^„“”]*)[“”]
    | (?<!\d)""+(?=[^\s"“”„])([^"“”„]+)""+           # doubled
    | (?<!\d)"((?:[^"“”„]|“[^"“”„]*”)*)"             # may hold curly pairs
    | (?:(?<!\d)"|[“”„])([^"“”„]*)["“”„]             # two of different kinds
    """,
    re.VERBOSE,
)


def quoted_text(prompt: str) -> str:
    """The text between the first pair of double quotes, straight or curly, without blanks at its ends.

    Quotes inside a pair of the other kind belong to the text (`“say "HI"”`), unless they enclose all of it. A straight
    quote right after a digit is an inch mark (`a 5" disk labelled "DATA"`), unless it opens the only pair there is.
    Prompts with one kind of quotes and no inch marks are read as Flow-GRPO reads them.

    Raises:
        UsageError: when the prompt quotes nothing, or only blanks.
    """
    found = _QUOTED.search(prompt) or _ANY_PAIR.search(prompt)
    if found is None:
        raise UsageError(
            f"The prompt '{prompt}' quotes no text", 'Write the text to be drawn in double quotes: "HELLO".'
        )
    text = str(found[found.lastindex or 0]).strip()
    while len(text) > 1 and text[0] + text[-1] in ('""', "“”"):
        text = text[1:-1].strip()
    if not text:
        raise UsageError(f"The prompt '{prompt}' quotes an empty text", 'Write the text to be drawn: "HELLO".')
    return text


def quoted_texts(prompts: Sequence[str]) -> list[str]:
    """`quoted_text` of each prompt."""
    return [quoted_text(prompt) for prompt in prompts]


def normalised(text: str) -> str:
    """`text` in lower case without spaces, the form in which Flow-GRPO compares (arXiv 2505.05470, appendix)."""
    return text.replace(" ", "").lower()


def similarity(reading: str, target: str) -> float:
    """1 when the normalised target is part of the reading, else `1 - min(d, n) / n` in [0, 1].

    `d` is the edit distance of the normalised texts and `n` the length of the target (Flow-GRPO, arXiv 2505.05470,
    OCR reward).
    """
    read, wanted = normalised(reading), normalised(target)
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the least number of insertions, deletions and replacements of characters."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def missing_ocr(user: str) -> MissingDependencyError:
    """The error for an install without the OCR packages; `user` is what needs them."""
    return MissingDependencyError(f"{user} needs rapidocr and onnxruntime", f"Run: {INSTALL_OCR}")
