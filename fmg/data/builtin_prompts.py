"""The prompt sets that ship with fmg: everyday scenes, words to be written, and GenEval's templates.

Each has a training and a held-out half that share no combination. All are small and written for fmg, for runs that need
no file and no download.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any, Literal

from fmg.core.prompt import Prompt
from fmg.data.prompt_sets import PromptList, spread
from fmg.registry.config import ComponentConfig

Split = Literal["train", "heldout"]
_HELD_OUT_EVERY = 5


class BuiltinPromptsConfig(ComponentConfig):
    """A fixed set of prompts; it has no options."""


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


def everyday_train(config: BuiltinPromptsConfig) -> PromptList:
    """Everyday scenes for training."""
    return PromptList("everyday-train", _everyday("train"))


def everyday_heldout(config: BuiltinPromptsConfig) -> PromptList:
    """Everyday scenes whose combination of subject and setting is not trained on."""
    return PromptList("everyday-heldout", _everyday("heldout"))


def _everyday(split: Split) -> list[Prompt]:
    prompts = []
    for (i, (tag, subject)), (j, setting) in product(enumerate(_SUBJECTS), enumerate(_SETTINGS)):
        # steps of 2 along the settings visit every setting and every subject
        held_out = (i + 2 * j) % _HELD_OUT_EVERY == 0
        if held_out == (split == "heldout"):
            prompts += [Prompt(f"{style} of {subject} {setting}", tag, {}) for style in _STYLES]
    return prompts


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
_TRAINED_WORDS = (
    "OPEN", "CLOSED", "HELLO", "FRESH BREAD", "COFFEE", "LIBRARY", "NORTH 12", "NO ENTRY", "GOOD MORNING",
    "SPRING SALE", "WINTER",
    "MUSEUM", "TICKETS", "RIVER WALK", "PLATFORM 4", "JAZZ NIGHT", "WELCOME", "HAPPY DAYS", "GARDEN TOOLS",
    "QUIET PLEASE", "ROOM 27", "BOOK FAIR", "SOUP OF THE DAY", "BICYCLES",
)  # fmt: skip
_HELD_OUT_WORDS = ("HARBOUR", "LATE SHOW", "EXIT 9", "TEA HOUSE", "WOODWORK", "FIRST SNOW", "MARKET", "TURN LEFT")


def lettering_train(config: BuiltinPromptsConfig) -> PromptList:
    """Words on signs, mugs and posters for training: the task of the OCR rewards."""
    return PromptList("lettering-train", _lettering(_TRAINED_WORDS))


def lettering_heldout(config: BuiltinPromptsConfig) -> PromptList:
    """The same surfaces with words that are in no training prompt."""
    return PromptList("lettering-heldout", _lettering(_HELD_OUT_WORDS))


def _lettering(words: tuple[str, ...]) -> list[Prompt]:
    return [Prompt(text.format(word), tag, {}) for word, (tag, text) in product(words, _SURFACES)]


# GenEval's templates and form of metadata (Ghosh et al., arXiv 2310.11513), with combinations of our own. Its own 553
# prompts are read from the published file: `--prompts evaluation_metadata.jsonl`.
_OBJECTS = {
    "dog": "dogs",
    "bicycle": "bicycles",
    "bench": "benches",
    "umbrella": "umbrellas",
    "cup": "cups",
    "banana": "bananas",
    "clock": "clocks",
    "vase": "vases",
    "bus": "buses",
    "horse": "horses",
    "suitcase": "suitcases",
    "laptop": "laptops",
    "bird": "birds",
    "chair": "chairs",
    "boat": "boats",
    "sandwich": "sandwiches",
}
_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_COUNTS = {"two": 2, "three": 3, "four": 4}
_RELATIONS = ("left of", "right of", "above", "below")
_PROMPTS_A_TAG = 60

Include = list[dict[str, Any]]


def geneval_train(config: BuiltinPromptsConfig) -> PromptList:
    """Prompts in GenEval's templates for training."""
    return PromptList("geneval-train", _geneval("train"))


def geneval_heldout(config: BuiltinPromptsConfig) -> PromptList:
    """Prompts in GenEval's templates whose combination is not trained on."""
    return PromptList("geneval-heldout", _geneval("heldout"))


def _geneval(split: Split) -> list[Prompt]:
    prompts = []
    for entries in (_single(), _two(), _counting(), _colors(), _position(), _color_attr()):
        for number, metadata in enumerate(spread(list(entries), _PROMPTS_A_TAG)):
            # the third of five: neither the first object nor the last one is always held out
            if (number % _HELD_OUT_EVERY == _HELD_OUT_EVERY // 2) == (split == "heldout"):
                prompts.append(Prompt(metadata["prompt"], metadata["tag"], metadata))
    return prompts


def _single() -> Iterator[dict[str, Any]]:
    for name in _OBJECTS:
        yield _entry("single_object", _a(name), [{"class": name, "count": 1}])


def _two() -> Iterator[dict[str, Any]]:
    for first, second in combinations(_OBJECTS, 2):
        include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
        yield _entry("two_object", f"{_a(first)} and {_a(second)}", include)


def _counting() -> Iterator[dict[str, Any]]:
    for (name, plural), (word, count) in product(_OBJECTS.items(), _COUNTS.items()):
        entry = _entry("counting", f"{word} {plural}", [{"class": name, "count": count}])
        yield {**entry, "exclude": [{"class": name, "count": count + 1}]}


def _colors() -> Iterator[dict[str, Any]]:
    for name, color in product(_OBJECTS, _COLORS):
        yield _entry("colors", _a(f"{color} {name}"), [{"class": name, "count": 1, "color": color}])


def _position() -> Iterator[dict[str, Any]]:
    for (first, second), relation in product(combinations(_OBJECTS, 2), _RELATIONS):
        # the second object is the one that the first is placed by
        include: Include = [{"class": second, "count": 1}, {"class": first, "count": 1, "position": [relation, 0]}]
        yield _entry("position", f"{_a(first)} {relation} {_a(second)}", include)


def _color_attr() -> Iterator[dict[str, Any]]:
    for number, (first, second) in enumerate(combinations(_OBJECTS, 2)):
        # 3 and 7 have no factor in common with the number of colours, so that all of them meet
        colors = _COLORS[3 * number % len(_COLORS)], _COLORS[(7 * number + 1) % len(_COLORS)]
        include = [{"class": n, "count": 1, "color": c} for n, c in zip((first, second), colors, strict=True)]
        text = f"{_a(f'{colors[0]} {first}')} and {_a(f'{colors[1]} {second}')}"
        yield _entry("color_attr", text, include)


def _entry(tag: str, text: str, include: Include) -> dict[str, Any]:
    return {"tag": tag, "include": include, "prompt": f"a photo of {text}"}


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
