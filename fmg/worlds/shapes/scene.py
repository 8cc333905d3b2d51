"""What a picture of the shapes world should show: clauses of objects, with GenEval-style metadata.

Coordinates are pixels of a 32 x 32 picture, x to the right and y down, with the centre at (16, 16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["circle", "square", "triangle", "cross"]
Color = Literal["red", "green", "blue", "yellow", "purple"]
Position = Literal["left", "right", "top", "bottom", "center"]
Direction = Literal["left of", "right of", "above", "below"]
Tag = Literal["single_object", "two_object", "counting", "position"]

KINDS: tuple[Kind, ...] = get_args(Kind)
COLORS: tuple[Color, ...] = get_args(Color)
POSITIONS: tuple[Position, ...] = get_args(Position)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

IMAGE_SIZE = 32
BACKGROUND_RGB = (240, 240, 235)
PALETTE_RGB: dict[Color, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 85, 220),
    "yellow": (245, 205, 10),
    "purple": (130, 20, 170),
}
ANCHORS: dict[Position, tuple[float, float]] = {
    "left": (9.0, 16.0),
    "right": (23.0, 16.0),
    "top": (16.0, 9.0),
    "bottom": (16.0, 23.0),
    "center": (16.0, 16.0),
}


@dataclass(frozen=True)
class Relation:
    """A clause's objects lie in `direction` of the objects of the clause with index `other`."""

    direction: Direction
    other: int


@dataclass(frozen=True)
class Clause:
    """`count` objects of one kind and colour, at an absolute position or in relation to another clause, or anywhere."""

    kind: Kind
    color: Color
    count: int = 1
    position: Position | None = None
    relation: Relation | None = None

    def metadata(self) -> dict[str, Any]:
        """One entry of GenEval's `include`; `position` is a word, `[direction, clause index]`, or absent."""
        entry: dict[str, Any] = {"class": self.kind, "count": self.count, "color": self.color}
        if self.position is not None:
            entry["position"] = self.position
        if self.relation is not None:
            entry["position"] = [self.relation.direction, self.relation.other]
        return entry


@dataclass(frozen=True)
class Scene:
    """A specification that a prompt expresses and a picture can be checked against."""

    tag: Tag
    include: tuple[Clause, ...]

    @property
    def objects(self) -> int:
        """Number of objects the picture should show."""
        return sum(clause.count for clause in self.include)

    def metadata(self, prompt: str) -> dict[str, Any]:
        """GenEval-style record: `tag`, `include` and `prompt`."""
        return {"tag": self.tag, "include": [clause.metadata() for clause in self.include], "prompt": prompt}


@dataclass(frozen=True)
class PlacedObject:
    """An object with its geometry: centre (`x`, `y`) and side length `size`, in pixels."""

    kind: Kind
    color: Color
    x: float
    y: float
    size: float


def single(kind: Kind, color: Color, position: Position) -> Scene:
    """The scene with one object at an absolute position."""
    return Scene("single_object", (Clause(kind, color, position=position),))
