"""Everyday scenes as prompts: a small set of our own making, for runs that need no file and no download."""

from __future__ import annotations

from itertools import product
from typing import Literal

from fmg.core.types import Prompt
from fmg.data.configs import EverydayPromptsConfig
from fmg.data.prompt_sets import PromptList
from fmg.registry import prompt_sets

_SUBJECTS = (
    ("animal", "a sleeping orange cat"),
    ("animal", "two herons"),
    ("animal", "a snail with a striped shell"),
    ("animal", "a border collie that carries a stick"),
    ("person", "an old fisherman with a wool hat"),
    ("person", "a girl who flies a paper kite"),
    ("person", "a baker with flour on the arms"),
    ("person", "three friends around a chessboard"),
    ("thing", "a dented copper kettle"),
    ("thing", "a red bicycle with a wicker basket"),
    ("thing", "a stack of old books and a candle"),
    ("thing", "a glass jar of blue marbles"),
    ("place", "a small wooden house with green shutters"),
    ("place", "a narrow stone bridge"),
    ("place", "a market stall full of oranges"),
    ("place", "a lighthouse"),
)
_SETTINGS = (
    "on a rainy morning",
    "at sunset, with long shadows",
    "under the first snow",
    "in thick fog",
    "in the bright light of noon",
    "beside a quiet lake",
    "at night, lit by a street lamp",
    "behind a window with drops of rain",
)
_STYLES = ("a photograph", "an oil painting", "a pencil drawing", "a watercolour")
_HELD_OUT_EVERY = 5


@prompt_sets.register("everyday-train", EverydayPromptsConfig)
def everyday_train(config: EverydayPromptsConfig) -> PromptList:
    """Everyday scenes that training draws from."""
    return PromptList("everyday-train", _prompts("train"))


@prompt_sets.register("everyday-heldout", EverydayPromptsConfig)
def everyday_heldout(config: EverydayPromptsConfig) -> PromptList:
    """Everyday scenes whose combination of subject and setting training never sees."""
    return PromptList("everyday-heldout", _prompts("heldout"))


def _prompts(split: Literal["train", "heldout"]) -> list[Prompt]:
    prompts = []
    for (i, (tag, subject)), (j, setting) in product(enumerate(_SUBJECTS), enumerate(_SETTINGS)):
        # steps of 2 along the settings visit every setting and every subject
        held_out = (i + 2 * j) % _HELD_OUT_EVERY == 0
        if held_out == (split == "heldout"):
            prompts += [Prompt(f"{style} of {subject} {setting}", tag, {}) for style in _STYLES]
    return prompts
