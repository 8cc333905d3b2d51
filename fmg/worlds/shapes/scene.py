"""What an image of the shapes world should show: clauses of objects, with GenEval-style metadata.

Coordinates are pixels of a 32 x 32 image, x to the right and y down, with the centre at (16, 16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

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
    """What a prompt asks for and an image is checked against."""

    tag: Tag
    include: tuple[Clause, ...]

    @property
    def objects(self) -> int:
        """Number of objects the image should show."""
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


FloatArray = NDArray[np.float32]

SINGLE_SIZES = (11.0, 15.0)
"""Side length range of a lone object, in pixels."""
SHARED_SIZES = (8.0, 10.0)
"""Side length range of objects that share an image, in pixels."""
JITTER = 1.0
"""Largest displacement from the nominal centre along each axis, in pixels."""
CROSS_ARM = 0.36
"""Width of a cross's arms as a share of its side."""

AREA: dict[Kind, float] = {
    "circle": np.pi / 4,
    "square": 1.0,
    "triangle": 0.5,
    "cross": 2 * CROSS_ARM - CROSS_ARM**2,
}
"""Area of a shape of side 1."""
CENTROID_DROP: dict[Kind, float] = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6, "cross": 0.0}
"""How far below its box's centre a shape of side 1 has its centroid."""

_SLOTS: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((16.0, 16.0),),
    2: ((9.0, 16.0), (23.0, 16.0)),
    3: ((9.0, 9.0), (23.0, 9.0), (16.0, 23.0)),
    4: ((9.0, 9.0), (23.0, 9.0), (9.0, 23.0), (23.0, 23.0)),
}
_RELATION_SLOTS: dict[Direction, tuple[tuple[float, float], tuple[float, float]]] = {
    "left of": ((9.0, 16.0), (23.0, 16.0)),
    "right of": ((23.0, 16.0), (9.0, 16.0)),
    "above": ((16.0, 9.0), (16.0, 23.0)),
    "below": ((16.0, 23.0), (16.0, 9.0)),
}


def place(scene: Scene, rng: np.random.Generator) -> tuple[PlacedObject, ...]:
    """Random positions and sizes for the objects of a scene (at most four, never overlapping)."""
    sizes = SINGLE_SIZES if scene.objects == 1 else SHARED_SIZES
    placed = []
    for clause, (x, y) in zip(_flatten(scene), _centres(scene, rng), strict=True):
        dx, dy = rng.uniform(-JITTER, JITTER, size=2)
        placed.append(PlacedObject(clause.kind, clause.color, x + dx, y + dy, rng.uniform(*sizes)))
    return tuple(placed)


def _flatten(scene: Scene) -> list[PlacedObject]:
    return [PlacedObject(c.kind, c.color, 0.0, 0.0, 0.0) for c in scene.include for _ in range(c.count)]


def _centres(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    first = scene.include[0]
    if first.position is not None:
        return [ANCHORS[first.position]]
    if first.relation is not None:
        return list(_RELATION_SLOTS[first.relation.direction])
    slots = _SLOTS[scene.objects]
    return [slots[i] for i in rng.permutation(len(slots))]


def coverage(kind: Kind, x: FloatArray, y: FloatArray, size: FloatArray) -> FloatArray:
    """Share of each pixel that a shape covers.

    Args:
        kind: the shape.
        x, y, size: (n,) box centres and side lengths in pixels.

    Returns:
        (n, 32, 32) in [0, 1], from the signed distance to the outline (exact to first order in the pixel size).
    """
    grid = np.arange(IMAGE_SIZE, dtype=np.float32) + np.float32(0.5)
    half = (size * np.float32(0.5))[:, None, None]
    dx = np.abs(grid[None, None, :] - x[:, None, None])
    dy = grid[None, :, None] - y[:, None, None]
    covered: FloatArray = np.clip(0.5 - _SIGNED_DISTANCE[kind](dx, dy, half), 0.0, 1.0)
    return covered


def _circle(dx: FloatArray, dy: FloatArray, half: FloatArray) -> FloatArray:
    distance: FloatArray = np.sqrt(dx**2 + dy**2) - half
    return distance


def _square(dx: FloatArray, dy: FloatArray, half: FloatArray) -> FloatArray:
    distance: FloatArray = np.maximum(dx - half, np.abs(dy) - half)
    return distance


def _triangle(dx: FloatArray, dy: FloatArray, half: FloatArray) -> FloatArray:
    slanted = (2 * dx - (dy + half)) / np.float32(np.sqrt(5))
    distance: FloatArray = np.maximum(slanted, dy - half)
    return distance


def _cross(dx: FloatArray, dy: FloatArray, half: FloatArray) -> FloatArray:
    dy, arm = np.abs(dy), half * np.float32(CROSS_ARM)
    distance: FloatArray = np.minimum(np.maximum(dx - half, dy - arm), np.maximum(dx - arm, dy - half))
    return distance


_SIGNED_DISTANCE = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}


def render(pictures: Sequence[Sequence[PlacedObject]]) -> Float[np.ndarray, "b 3 32 32"]:
    """Renders images as float32 RGB in [0, 1]; later objects are painted over earlier ones."""
    background = np.asarray(BACKGROUND_RGB, dtype=np.float32) / np.float32(255)
    images: FloatArray = np.empty((len(pictures), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    images[:] = background[:, None, None]
    depth = max((len(picture) for picture in pictures), default=0)
    for layer in range(depth):
        for kind in KINDS:
            rows = [i for i, p in enumerate(pictures) if len(p) > layer and p[layer].kind == kind]
            if rows:
                _paint(images, rows, [pictures[i][layer] for i in rows])
    return images


def _paint(images: FloatArray, rows: list[int], objects: list[PlacedObject]) -> None:
    x, y, size = (np.asarray([getattr(o, name) for o in objects], dtype=np.float32) for name in ("x", "y", "size"))
    alpha = coverage(objects[0].kind, x, y, size)[:, None]
    paint = np.asarray([PALETTE_RGB[o.color] for o in objects], dtype=np.float32)[:, :, None, None] / 255
    images[rows] = images[rows] * (1 - alpha) + paint * alpha
