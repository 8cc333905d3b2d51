"""Prompts that ask for written words, of our own making: the task of the OCR rewards.

Words of the held-out set are in no training prompt.
"""

from __future__ import annotations

from itertools import product

from fmg.core.types import Prompt
from fmg.data.configs import LetteringPromptsConfig
from fmg.data.prompt_sets import PromptList
from fmg.registry import prompt_sets

_SURFACES = (
    ("shop", 'a wooden shop sign that says "{}"'),
    ("neon", 'a neon sign in a window with the words "{}"'),
    ("book", 'an old book with "{}" on its cover'),
    ("mug", 'a white mug on a desk with the text "{}"'),
    ("poster", 'a concert poster with the headline "{}"'),
    ("chalk", 'a blackboard outside a cafe that reads "{}"'),
    ("train", 'a departure board at a station that shows "{}"'),
    ("cake", 'a birthday cake with "{}" written in icing'),
)
_TRAIN = (
    "OPEN", "CLOSED", "HELLO", "FRESH BREAD", "COFFEE", "LIBRARY", "NORTH 12", "NO ENTRY", "GOOD MORNING",
    "SPRING SALE", "WINTER",
    "MUSEUM", "TICKETS", "RIVER WALK", "PLATFORM 4", "JAZZ NIGHT", "WELCOME", "HAPPY DAYS", "GARDEN TOOLS",
    "QUIET PLEASE", "ROOM 27", "BOOK FAIR", "SOUP OF THE DAY", "BICYCLES",
)  # fmt: skip
_HELD_OUT = ("HARBOUR", "LATE SHOW", "EXIT 9", "TEA HOUSE", "WOODWORK", "FIRST SNOW", "MARKET", "TURN LEFT")


@prompt_sets.register("lettering-train", LetteringPromptsConfig)
def lettering_train(config: LetteringPromptsConfig) -> PromptList:
    """Words on signs, mugs and posters that training draws from."""
    return PromptList("lettering-train", _prompts(_TRAIN))


@prompt_sets.register("lettering-heldout", LetteringPromptsConfig)
def lettering_heldout(config: LetteringPromptsConfig) -> PromptList:
    """The same surfaces with words that training never sees."""
    return PromptList("lettering-heldout", _prompts(_HELD_OUT))


def _prompts(words: tuple[str, ...]) -> list[Prompt]:
    return [Prompt(text.format(word), tag, {}) for word, (tag, text) in product(words, _SURFACES)]
