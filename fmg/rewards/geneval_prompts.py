"""What a GenEval prompt asks for: from its metadata, or from the text itself, which follows six templates.

The vocabulary is that of GenEval (Ghosh et al., arXiv 2310.11513): the 80 COCO classes in COCO's order, three of them
renamed (computer mouse, tv remote, computer keyboard), and ten colours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fmg.core.errors import UsageError
from fmg.core.json_io import read_objects
from fmg.registry.validation import first_problem
from fmg.rewards.geneval_rules import RELATIONS, Clause, Position, Relation, Specification

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_OBJECTS = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse,
tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush
"""
OBJECT_NAMES = tuple(" ".join(name.split()) for name in _OBJECTS.split(","))
_NUMBERS = {
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
}
_IRREGULAR_PLURALS = {
    "person": ("people",),
    "sheep": ("sheep",),
    "skis": ("skis",),
    "scissors": ("scissors",),
    "knife": ("knives",),
    "computer mouse": ("computer mice",),
    "broccoli": ("broccoli",),
}


class _Clause(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(alias="class")
    count: int = Field(ge=1)
    color: str | None = None
    position: tuple[Relation, Annotated[int, Field(ge=0)]] | None = None

    def clause(self) -> Clause:
        return Clause(self.name, self.count, self.color, None if self.position is None else Position(*self.position))


class _Metadata(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)
    tag: str
    prompt: str
    include: tuple[_Clause, ...] = Field(min_length=1)
    exclude: tuple[_Clause, ...] = ()


def specification_of(metadata: Mapping[str, Any]) -> Specification:
    """The specification in one entry of GenEval's `evaluation_metadata.jsonl`.

    Raises:
        UsageError: for missing keys, an unknown class or colour, or a position that refers to no earlier clause.
    """
    try:
        entry = _Metadata.model_validate(metadata)
    except ValidationError as error:
        problem = first_problem(error, _Metadata, "The GenEval metadata", noun="key")
        raise UsageError(problem.what, problem.fix) from None
    for index, clause in enumerate(entry.include):
        if clause.position is not None and clause.position[1] >= index:
            raise UsageError(
                f"Clause {index} of '{entry.prompt}' is placed relative to clause {clause.position[1]}",
                "Refer to an earlier clause, counted from 0.",
            )
    for clause in (*entry.include, *entry.exclude):
        if clause.name not in OBJECT_NAMES:
            raise UsageError(
                f"GenEval has no class '{clause.name}'", "Use the names of the COCO classes as GenEval does."
            )
        if clause.color is not None and clause.color not in COLORS:
            raise UsageError(f"GenEval has no colour '{clause.color}'", f"Use one of {', '.join(COLORS)}.")
    include, exclude = (tuple(clause.clause() for clause in part) for part in (entry.include, entry.exclude))
    return Specification(entry.tag, include, exclude)


def read_metadata(path: Path) -> dict[str, Specification]:
    """Specifications by prompt from a GenEval metadata file, one JSON object a line.

    Raises:
        UsageError: naming file and line.
    """
    specifications: dict[str, Specification] = {}
    for number, entry in read_objects(path):
        try:
            specifications[str(entry.get("prompt"))] = specification_of(entry)
        except UsageError as error:
            raise UsageError(f"{path}:{number}: {error.what}", error.fix) from None
    return specifications


def parse_prompt(prompt: str) -> Specification:
    """The specification of a prompt in one of GenEval's six templates.

    `a photo of a C`, `a photo of a C and a C`, `a photo of N Cs`, `a photo of a COLOR C`,
    `a photo of a C REL a C`, `a photo of a COLOR C and a COLOR C`.

    Raises:
        UsageError: for any other text.
    """
    matches = [(tag, m) for tag, pattern in _patterns().items() if (m := pattern.fullmatch(prompt.strip())) is not None]
    if not matches:
        raise UsageError(
            f"'{prompt}' is not a GenEval prompt",
            "Write it in one of GenEval's templates, such as 'a photo of a red apple', or give geneval.metadata.",
        )
    tag, found = matches[0]
    group = {name: text.lower() for name, text in found.groupdict().items()}
    if tag == "counting":
        name, number = _singular()[group["things"]], _NUMBERS[group["number"]]
        return Specification(tag, (Clause(name, number),), (Clause(name, number + 1),))
    first = Clause(group["a"], 1, group.get("color_a"))
    if tag in ("single_object", "colors"):
        return Specification(tag, (first,))
    if tag == "position":
        relation = next(r for r in RELATIONS if r == group["relation"])
        return Specification(tag, (Clause(group["b"], 1), Clause(group["a"], 1, None, Position(relation, 0))))
    return Specification(tag, (first, Clause(group["b"], 1, group.get("color_b"))))


@cache
def _singular() -> dict[str, str]:
    plurals = {f"{name}es" if name.endswith("s") else f"{name}s": name for name in OBJECT_NAMES}
    plurals |= {f"{name}es": name for name in OBJECT_NAMES if name.endswith(("s", "x", "ch", "sh"))}
    return plurals | {plural: name for name, irregular in _IRREGULAR_PLURALS.items() for plural in irregular}


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    def one_of(group: str, words: tuple[str, ...] | list[str]) -> str:
        return f"(?P<{group}>{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})"

    article = "an? "
    a, b = one_of("a", OBJECT_NAMES), one_of("b", OBJECT_NAMES)
    color_a, color_b = one_of("color_a", COLORS), one_of("color_b", COLORS)
    number, things = one_of("number", list(_NUMBERS)), one_of("things", list(_singular()))
    templates = {
        "single_object": f"{article}{a}",
        "two_object": f"{article}{a} and {article}{b}",
        "counting": f"{number} {things}",
        "colors": f"{article}{color_a} {a}",
        "position": f"{article}{a} {one_of('relation', list(RELATIONS))} {article}{b}",
        "color_attr": f"{article}{color_a} {a} and {article}{color_b} {b}",
    }
    return {tag: re.compile(f"a photo of {template}", re.IGNORECASE) for tag, template in templates.items()}
