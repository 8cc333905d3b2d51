"""Rule-based verifier: detects the objects of an image and compares them with a scene.

The rules for counts and relations follow GenEval (Ghosh et al., 2023). Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import ndimage

from fmg.rewards.geneval_rules import relations
from fmg.worlds.shapes.scene import (
    ANCHORS,
    AREA,
    BACKGROUND_RGB,
    CENTROID_DROP,
    COLORS,
    IMAGE_SIZE,
    KINDS,
    PALETTE_RGB,
    POSITIONS,
    Clause,
    Color,
    FloatArray,
    Kind,
    Position,
    Scene,
    coverage,
)

Images = Float[np.ndarray, "b 3 32 32"]

MIN_AREA = 6
"""Components smaller than this many pixels are specks, not objects."""
MIN_CONFIDENCE = 0.72
"""A component below this confidence has no recognisable kind."""
POSITION_THRESHOLD = 0.1
"""GenEval's relation rule: offsets are shortened by this share of the boxes' sizes."""

PALETTE_TOLERANCE = 0.35
"""Mean distance to the palette (RGB in [0, 1]) at which palette fidelity reaches 0."""
SHARP_OUTLINE = 0.85
"""Mean relative contrast across an anti-aliased outline that counts as fully sharp."""

_PALETTE = np.asarray([*(PALETTE_RGB[c] for c in COLORS), BACKGROUND_RGB], dtype=np.float32) / 255
_CONNECTIVITY = np.zeros((3, 3, 3), dtype=bool)
_CONNECTIVITY[1] = True


@dataclass(frozen=True)
class Detection:
    """One object found in an image.

    Attributes:
        kind: best matching kind.
        color: most frequent palette colour.
        center: (x, y) of the box centre in pixels.
        box: (left, top, right, bottom) in pixels, right and bottom exclusive.
        confidence: IoU with the best template times the share of pixels of the main colour, in [0, 1].
    """

    kind: Kind
    color: Color
    center: tuple[float, float]
    box: tuple[int, int, int, int]
    confidence: float

    @property
    def recognisable(self) -> bool:
        return self.confidence >= MIN_CONFIDENCE

    @property
    def position(self) -> Position:
        """The absolute position whose anchor is nearest."""
        x, y = self.center
        return min(POSITIONS, key=lambda p: (x - ANCHORS[p][0]) ** 2 + (y - ANCHORS[p][1]) ** 2)


@dataclass(frozen=True)
class Quality:
    """Prompt-free image quality, each part (b,) in [0, 1].

    Attributes:
        recognisable: 1 where the image shows exactly one object and its kind can be told.
        sharpness: mean over outline pixels of the two-pixel contrast, relative to the object's contrast, divided by
            `SHARP_OUTLINE` and capped at 1.
        palette_fidelity: 1 - (mean distance to the palette away from outlines) / `PALETTE_TOLERANCE`.
    """

    recognisable: FloatArray
    sharpness: FloatArray
    palette_fidelity: FloatArray

    @property
    def total(self) -> FloatArray:
        """`recognisable * sharpness * palette_fidelity`: near 1 on true renders of one object."""
        return self.recognisable * self.sharpness * self.palette_fidelity


@dataclass(frozen=True)
class Verdict:
    """Agreement of images with scenes, each part (b,) in [0, 1].

    Attributes:
        color, shape, position: share of the wanted objects (or relations) whose attribute is right.
        count: 1 where the image shows exactly the wanted number of objects.
        soft: mean of the wanted parts among color, shape, position and count.
        strict: 1 where every wanted part is 1.
    """

    color: FloatArray
    shape: FloatArray
    position: FloatArray
    count: FloatArray
    soft: FloatArray
    strict: FloatArray


@dataclass(frozen=True)
class _Segmentation:
    nearest: NDArray[np.intp]
    distance: FloatArray
    labels: NDArray[np.int32]
    components: int


def _segment(images: Images) -> _Segmentation:
    """Nearest palette colour per pixel and the connected components of what is not background."""
    pixels = np.moveaxis(np.asarray(images, dtype=np.float32), 1, -1)
    squared = (pixels**2).sum(-1, keepdims=True) - 2 * pixels @ _PALETTE.T + (_PALETTE**2).sum(-1)
    nearest = squared.argmin(-1)
    distance = np.sqrt(np.maximum(np.take_along_axis(squared, nearest[..., None], -1)[..., 0], 0))
    labels, components = ndimage.label(nearest != len(COLORS), structure=_CONNECTIVITY)
    return _Segmentation(nearest, distance.astype(np.float32), np.asarray(labels, dtype=np.int32), components)


def detect(images: Images) -> list[tuple[Detection, ...]]:
    """Objects of each image, the most confident first.

    Args:
        images: float array in [0, 1]; one call labels the whole batch.
    """
    return _detections(images, _segment(images))


def _detections(images: Images, segmentation: _Segmentation) -> list[tuple[Detection, ...]]:
    labels, count = segmentation.labels, segmentation.components
    found: list[list[Detection]] = [[] for _ in range(len(labels))]
    slices = ndimage.find_objects(labels)
    histogram = np.bincount(
        labels.ravel() * len(_PALETTE) + segmentation.nearest.ravel(), minlength=(count + 1) * len(_PALETTE)
    ).reshape(count + 1, -1)[1:, : len(COLORS)]
    area = histogram.sum(-1)
    kept = np.flatnonzero(area >= MIN_AREA)
    if len(kept) == 0:
        return [() for _ in found]
    boxes = np.asarray([(s[0].start, s[2].start, s[1].start, s[2].stop, s[1].stop) for s in (slices[i] for i in kept)])
    rows = boxes[:, 0]
    paint = histogram[kept].argmax(-1)
    masks = labels[rows] == (kept + 1)[:, None, None]
    overlap = _template_overlap(_opacity(images[rows], masks, paint))
    best = overlap.argmax(-1)
    confidence = overlap.max(-1) * histogram[kept].max(-1) / area[kept]
    for row, (left, top, right, bottom), kind, color, score in zip(
        rows.tolist(), boxes[:, 1:].tolist(), best.tolist(), paint.tolist(), confidence.tolist(), strict=True
    ):
        center = ((left + right) / 2, (top + bottom) / 2)
        found[row].append(Detection(KINDS[kind], COLORS[color], center, (left, top, right, bottom), score))
    return [tuple(sorted(objects, key=lambda o: -o.confidence)) for objects in found]


def _opacity(images: Images, masks: NDArray[np.bool_], paint: NDArray[np.intp]) -> FloatArray:
    """How far each pixel (n, 32, 32) of a component and its rim is from the background to the paint, 0 to 1."""
    direction = _PALETTE[paint] - _PALETTE[-1]
    departure = np.einsum("nchw,nc->nhw", images - _PALETTE[-1][:, None, None], direction)
    share = departure / (direction**2).sum(-1)[:, None, None]
    rim = ndimage.binary_dilation(masks, structure=_CONNECTIVITY)
    opacity: FloatArray = np.clip(share, 0, 1) * rim
    return opacity


def _template_overlap(opacity: FloatArray) -> FloatArray:
    """Soft IoU (n, kinds) with templates that have the same area and centroid: sum of minima over sum of maxima."""
    grid = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    area = opacity.sum((1, 2))
    x, y = opacity.sum(1) @ grid / area, opacity.sum(2) @ grid / area
    overlap = np.empty((len(opacity), len(KINDS)), dtype=np.float32)
    for column, kind in enumerate(KINDS):
        size = np.sqrt(area / np.float32(AREA[kind]))
        template = coverage(kind, x, y - np.float32(CENTROID_DROP[kind]) * size, size)
        shared = np.minimum(opacity, template).sum((1, 2))
        overlap[:, column] = shared / (area + template.sum((1, 2)) - shared)
    return overlap


def quality(images: Images) -> Quality:
    """Prompt-free quality of images in [0, 1]."""
    segmentation = _segment(images)
    recognisable = [len(objects) == 1 and objects[0].recognisable for objects in _detections(images, segmentation)]
    return Quality(
        recognisable=np.asarray(recognisable, dtype=np.float32),
        sharpness=_sharpness(images, segmentation),
        palette_fidelity=_palette_fidelity(segmentation),
    )


def _outline(foreground: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels on either side of a border between foreground and background, one pixel deep."""
    border = np.zeros_like(foreground)
    vertical = foreground[:, 1:] != foreground[:, :-1]
    horizontal = foreground[:, :, 1:] != foreground[:, :, :-1]
    border[:, 1:] |= vertical
    border[:, :-1] |= vertical
    border[:, :, 1:] |= horizontal
    border[:, :, :-1] |= horizontal
    return border


def _sharpness(images: Images, segmentation: _Segmentation) -> FloatArray:
    background = _PALETTE[-1][None, :, None, None]
    departure = np.sqrt(((np.asarray(images, dtype=np.float32) - background) ** 2).sum(1))
    padded = np.pad(departure, ((0, 0), (1, 1), (1, 1)), mode="edge")
    slope = np.hypot(padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1], padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2])
    foreground = segmentation.nearest != len(COLORS)
    contrast = np.linalg.norm(_PALETTE[segmentation.nearest] - _PALETTE[-1], axis=-1)
    strongest = ndimage.maximum_filter(contrast, size=(1, 3, 3))
    border = _outline(foreground)
    relative = np.minimum(slope / np.maximum(strongest, 1e-6), 1.0)
    pixels = border.sum((1, 2))
    mean = (relative * border).sum((1, 2)) / np.maximum(pixels, 1)
    sharpness: FloatArray = np.minimum(mean / SHARP_OUTLINE, 1.0).astype(np.float32)
    return sharpness


def _palette_fidelity(segmentation: _Segmentation) -> FloatArray:
    flat = ~_outline(segmentation.nearest != len(COLORS))
    mean = (segmentation.distance * flat).sum((1, 2)) / np.maximum(flat.sum((1, 2)), 1)
    fidelity: FloatArray = np.clip(1 - mean / PALETTE_TOLERANCE, 0, 1).astype(np.float32)
    return fidelity


def verify(images: Images, scenes: Sequence[Scene]) -> Verdict:
    """Compare images with the scenes they should show; both have length b."""
    rows = [_judge(objects, scene) for objects, scene in zip(detect(images), scenes, strict=True)]
    columns = np.asarray(rows, dtype=np.float32).reshape(len(rows), 6).T
    return Verdict(*columns)


def _judge(objects: tuple[Detection, ...], scene: Scene) -> tuple[float, float, float, float, float, float]:
    assigned = _assign(objects, scene)
    wanted = scene.objects
    pairs = [(clause, o) for clause, group in zip(scene.include, assigned, strict=True) for o in group]
    color = sum(o.color == clause.color for clause, o in pairs) / wanted
    shape = sum(o.recognisable and o.kind == clause.kind for clause, o in pairs) / wanted
    count = float(len(objects) == wanted)
    placed = _placement(scene, assigned)
    parts = [color, shape, count] if placed is None else [color, shape, placed, count]
    soft = sum(parts) / len(parts)
    return color, shape, 1.0 if placed is None else placed, count, soft, float(min(parts) == 1.0)


def _assign(objects: tuple[Detection, ...], scene: Scene) -> list[list[Detection]]:
    """Give each clause its best matching detections: most attributes right first, then the most confident."""
    free = list(objects)
    groups: list[list[Detection]] = []
    for clause in scene.include:
        group: list[Detection] = []
        for _ in range(min(clause.count, len(free))):
            best = max(free, key=lambda o: (_matches(o, clause), o.confidence))
            free.remove(best)
            group.append(best)
        groups.append(group)
    return groups


def _matches(found: Detection, clause: Clause) -> int:
    return (found.kind == clause.kind) + (found.color == clause.color)


def _placement(scene: Scene, assigned: list[list[Detection]]) -> float | None:
    """Share of the wanted positions and relations that are right, None if the scene has none."""
    held: list[float] = []
    for clause, group in zip(scene.include, assigned, strict=True):
        if clause.position is not None:
            held.append(float(bool(group) and all(o.position == clause.position for o in group)))
        if clause.relation is not None:
            sides = (group, assigned[clause.relation.other])
            ours, theirs = ([np.asarray(o.box, dtype=np.float32) for o in side] for side in sides)
            pairs = [clause.relation.direction in relations(a, b, POSITION_THRESHOLD) for a in ours for b in theirs]
            held.append(float(bool(pairs) and all(pairs)))
    return sum(held) / len(held) if held else None


def blank(count: int) -> Images:
    """Images that show nothing but background."""
    background = _PALETTE[-1][None, :, None, None]
    return np.broadcast_to(background, (count, 3, IMAGE_SIZE, IMAGE_SIZE)).copy()
