"""Prompts in GenEval's six templates, of our own making: objects, counts, colours and places that a detector can check.

The templates and the form of the metadata are GenEval's (Ghosh et al., arXiv 2310.11513); the combinations are not its
553. Those are read from the published `evaluation_metadata.jsonl`: `--prompts evaluation_metadata.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any, Literal

from fmg.core.types import Prompt
from fmg.data.configs import DetectionPromptsConfig
from fmg.data.prompt_sets import PromptList, spread
from fmg.registry import prompt_sets

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
_HELD_OUT_EVERY = 5

Include = list[dict[str, Any]]


@prompt_sets.register("geneval-train", DetectionPromptsConfig)
def geneval_train(config: DetectionPromptsConfig) -> PromptList:
    """Prompts in GenEval's templates that training draws from."""
    return PromptList("geneval-train", _prompts("train"))


@prompt_sets.register("geneval-heldout", DetectionPromptsConfig)
def geneval_heldout(config: DetectionPromptsConfig) -> PromptList:
    """Prompts in GenEval's templates whose combination training never sees."""
    return PromptList("geneval-heldout", _prompts("heldout"))


def _prompts(split: Literal["train", "heldout"]) -> list[Prompt]:
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
