"""GenEval's rules (Ghosh et al., arXiv 2310.11513): what a prompt asks for, and whether the objects found fulfil it.

The vocabulary is GenEval's: the 80 COCO classes in COCO's order, three of them renamed (computer mouse, tv remote,
computer keyboard), and ten colours. A prompt's specification comes from its metadata, or from the text itself, which
follows six templates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float32, Int
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fmg.core.errors import UsageError
from fmg.core.json_io import read_objects
from fmg.registry.validation import first_problem

Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)

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
_NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: number for number, word in enumerate(_NUMBER_WORDS, start=1)}
_IRREGULAR_PLURALS = {
    "person": ("people",),
    "sheep": ("sheep",),
    "skis": ("skis",),
    "scissors": ("scissors",),
    "knife": ("knives",),
    "computer mouse": ("computer mice",),
    "broccoli": ("broccoli",),
}

# A direction counts when it makes up more than this share of the distance between two centres.
_DIRECTION_SHARE = 0.5
_NO_OFFSET = 1e-3


@dataclass(frozen=True)
class Position:
    """Where an object must be: `relation` to the objects of the include clause number `target`."""

    relation: Relation
    target: int


@dataclass(frozen=True)
class Clause:
    """`count` objects of a class, perhaps of one colour and at one place."""

    name: str
    count: int
    color: str | None = None
    position: Position | None = None


@dataclass(frozen=True)
class Specification:
    """What a prompt asks for: every `include` clause must be satisfied, and no `exclude` clause may be reached."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


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
    """Specifications by prompt from a GenEval metadata file, one JSON object per line.

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


@dataclass(frozen=True)
class Detections:
    """Objects found in one image, in any order.

    Attributes:
        boxes: corners x1, y1, x2, y2 in pixels, y down.
        labels: index of the class in `OBJECT_NAMES`.
        scores: confidence in [0, 1].
        masks: the pixels of each object.
    """

    boxes: Float32[NDArray[np.float32], "n 4"]
    labels: Int[NDArray[np.int64], " n"]
    scores: Float32[NDArray[np.float32], " n"]
    masks: Bool[NDArray[np.bool_], "n h w"]


@dataclass(frozen=True)
class Thresholds:
    """The constants of the published evaluation.

    Attributes:
        score: a detection counts when its score is strictly above this.
        counting_score: the same for the tag `counting`.
        position: share of the two boxes' sizes that is subtracted from the distance between their centres.
        max_objects: objects kept of each class, the most confident first.
    """

    score: float = 0.3
    counting_score: float = 0.9
    position: float = 0.1
    max_objects: int = 16


@dataclass(frozen=True)
class Verdict:
    """The verdict of the rules on one image.

    Attributes:
        correct: GenEval's own verdict: at least `count` objects of each clause, judged on the most confident `count`.
        strict: exactly `count` objects of each clause, judged on all of them (the reward server of Flow-GRPO).
        dense: mean partial credit of the clauses (the same server, trained on in Flow-GRPO): 1 when all are satisfied.
            Negative when a class is found more than twice as often as asked for.
        reasons: why not `correct`; empty when it is.
    """

    correct: bool
    strict: bool
    dense: float
    reasons: tuple[str, ...]


Objects = Mapping[str, Sequence[int]]
"""Rows of `Detections` by class name, the most confident first."""

ColorsOf = Callable[[str, Sequence[int]], Sequence[str]]
"""Colours of the objects in the given rows, which are of the given class."""


def kept_objects(
    found: Detections, names: Sequence[str], specification: Specification, thresholds: Thresholds
) -> dict[str, list[int]]:
    """The detections that count, by class name; classes without any are absent."""
    minimum = thresholds.counting_score if specification.tag == "counting" else thresholds.score
    # of equally confident objects the later one comes first, as in the published code
    order = np.argsort(found.scores, kind="stable")[::-1]
    objects: dict[str, list[int]] = {}
    for row in order[found.scores[order] > minimum]:
        rows = objects.setdefault(names[int(found.labels[row])], [])
        if len(rows) < thresholds.max_objects:
            rows.append(int(row))
    return objects


def relations(box: NDArray[np.float32], target: NDArray[np.float32], position_threshold: float) -> frozenset[Relation]:
    """Relations of `box` to `target`: two hold on a diagonal, none when the centres are close.

    The distance of the centres is shortened on each axis by `position_threshold` times the sum of both sizes, but
    divided by the norm of the unshortened one.
    """
    centre, size = (box[:2] + box[2:]) / 2, np.abs(box[2:] - box[:2])
    target_centre, target_size = (target[:2] + target[2:]) / 2, np.abs(target[2:] - target[:2])
    offset = centre - target_centre
    shortened = np.maximum(np.abs(offset) - position_threshold * (size + target_size), 0) * np.sign(offset)
    if bool(np.all(np.abs(shortened) < _NO_OFFSET)):
        return frozenset()
    x, y = shortened / np.linalg.norm(offset)
    holds: dict[Relation, bool] = {
        "left of": x < -_DIRECTION_SHARE,
        "right of": x > _DIRECTION_SHARE,
        "above": y < -_DIRECTION_SHARE,
        "below": y > _DIRECTION_SHARE,
    }
    return frozenset(relation for relation, true in holds.items() if true)


def judge(
    found: Detections,
    names: Sequence[str],
    specification: Specification,
    colors_of: ColorsOf,
    thresholds: Thresholds,
) -> Verdict:
    """The verdict on one image.

    Args:
        found: all detections of the image.
        names: class name of each label.
        specification: what the prompt asks for.
        colors_of: called only for clauses with a colour whose objects were found.
        thresholds: the constants of the rules.
    """
    objects = kept_objects(found, names, specification, thresholds)
    rules = _Rules(found.boxes, objects, colors_of, thresholds.position)
    reasons = rules.reasons(specification)
    strict, dense = rules.credit(specification)
    return Verdict(correct=not reasons, strict=strict, dense=dense, reasons=reasons)


@dataclass(frozen=True)
class _Rules:
    boxes: NDArray[np.float32]
    objects: Objects
    colors_of: ColorsOf
    position_threshold: float

    def reasons(self, specification: Specification) -> tuple[str, ...]:
        """Every failed clause of GenEval's own rules, which consider the `count` most confident objects of a class."""
        reasons: list[str] = []
        matched: list[Sequence[int] | None] = []
        for clause in specification.include:
            rows = self.objects.get(clause.name, ())[: clause.count]
            failures = self._failures(clause, rows, matched)
            reasons += failures
            matched.append(None if failures else rows)
        for clause in specification.exclude:
            number = len(self.objects.get(clause.name, ()))
            if number >= clause.count:
                reasons.append(f"expected {clause.name}<{clause.count}, found {number}")
        return tuple(reasons)

    def _failures(self, clause: Clause, rows: Sequence[int], matched: Sequence[Sequence[int] | None]) -> list[str]:
        if len(rows) < clause.count:
            return [f"expected {clause.name}>={clause.count}, found {len(rows)}"]
        if clause.color is not None:
            colors = list(self.colors_of(clause.name, rows))
            if colors.count(clause.color) < clause.count:
                wanted = f"{clause.color} {clause.name}>={clause.count}"
                return [f"expected {wanted}, found {', '.join(colors)}"]
        if clause.position is not None:
            targets = matched[clause.position.target]
            if targets is None:
                return [f"no target for {clause.name} to be {clause.position.relation}"]
            if not self._placed(rows, targets, clause.position.relation):
                return [f"expected {clause.name} {clause.position.relation} target"]
        return []

    def credit(self, specification: Specification) -> tuple[bool, float]:
        """Strict verdict and dense score; a clause considers all objects of its class, whose number must be exact.

        A clause earns `1 - |found - count| / count`, and with a colour the same for objects of that colour. A relation
        that fails earns 0 and then 1, one that is satisfied 1, as in the published server. When the number is wrong, a
        colour or relation earns 0.
        """
        strict = True
        earned: list[float] = []
        matched: list[Sequence[int] | None] = []
        for clause in specification.include:
            rows = self.objects.get(clause.name, ())
            earned.append(_closeness(len(rows), clause.count))
            holds = len(rows) == clause.count
            if not holds and (clause.color is not None or clause.position is not None):
                earned.append(0.0)
            if holds and clause.color is not None:
                right = list(self.colors_of(clause.name, rows)).count(clause.color)
                earned.append(_closeness(right, clause.count))
                holds = right == clause.count
            if holds and clause.position is not None:
                targets = matched[clause.position.target]
                holds = targets is not None and self._placed(rows, targets, clause.position.relation)
                if targets is None:
                    earned.append(0.0)
                else:
                    earned += [1.0] if holds else [0.0, 1.0]
            strict = strict and holds
            matched.append(rows if holds else None)
        return strict, sum(earned) / len(earned) if earned else 0.0

    def _placed(self, rows: Sequence[int], targets: Sequence[int], relation: Relation) -> bool:
        return all(
            relation in relations(self.boxes[row], self.boxes[target], self.position_threshold)
            for row in rows
            for target in targets
        )


def _closeness(number: int, wanted: int) -> float:
    return 1 - abs(wanted - number) / wanted
