"""A prompt, and the warning when a model does not read all of it. Imports no torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fmg.core.events import Notice, Observer

PROMPT_FILE_SUFFIXES = (".txt", ".jsonl")
"""The kinds of prompt files: one prompt per line, or one JSON object per line."""


@dataclass(frozen=True)
class Prompt:
    """One entry of a prompt set. `metadata` follows GenEval (`include`: class, count, color, position)."""

    text: str
    tag: str
    metadata: Mapping[str, object]


MASK = "_mask"
"""Suffix of a tokenizer's name, for its mask: 1 for tokens and 0 for padding."""


@dataclass(frozen=True)
class PromptForm:
    """The text that a tokenizer reads for a prompt.

    Attributes:
        prefix, suffix: what is put around it, such as an instruction or the turn of a chat.
        lower: whether it is in lower case.
        strip: whether spaces around it are dropped.
    """

    prefix: str = ""
    suffix: str = ""
    lower: bool = False
    strip: bool = False

    def __call__(self, prompt: str) -> str:
        text = prompt.lower() if self.lower else prompt
        return self.prefix + (text.strip() if self.strip else text) + self.suffix


# letters and symbols of Unicode that show nothing: fillers of Hangul and the empty Braille cell
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"


def is_blank(text: str) -> bool:
    """Whether a text is invisible: empty, or only white space, control and zero-width characters."""
    return all(c.isspace() or c in _FILLERS or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def cut_prompts(tokens: Mapping[str, int], limit: int) -> str:
    """The warning about prompts that a model does not read to the end; empty when it reads them all.

    They are truncated at `limit` everywhere, as in diffusers: in training, evaluation, verification and generation.

    Args:
        tokens: how many each prompt has.
        limit: how many the model reads.
    """
    long = {prompt: count for prompt, count in tokens.items() if count > limit}
    if not long:
        return ""
    prompt, count = next(iter(long.items()))
    one = f"The prompt '{prompt:.60}' has {count} tokens" if len(tokens) == 1 else ""
    some = f"{len(long)} of {len(tokens)} prompts have more than {limit} tokens ('{prompt:.60}' has {count})"
    return f"{one or some}; the model reads the first {limit}. Shorten any prompt that should be read in full."


@runtime_checkable
class CutsPrompts(Protocol):
    """A model or a backend that can tell which prompts it does not read to the end."""

    def cut_prompts(self, prompts: Sequence[str]) -> str:
        """One or two sentences for people (`cut_prompts`); empty when it reads them all."""


def tell_of_cuts(reader: object, prompts: Sequence[str], observer: Observer) -> None:
    """Tells an observer which prompts a model or a backend truncates, if it knows."""
    if isinstance(reader, CutsPrompts) and (said := reader.cut_prompts(prompts)):
        observer(Notice("warning", said))
