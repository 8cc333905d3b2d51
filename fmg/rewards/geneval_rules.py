"""GenEval's verdicts from detections (Ghosh et al., arXiv 2310.11513, section 3), apart from any detector.

What a prompt asks for is a `Specification`; what a detector found is a `Detections`. The rules follow the published
evaluation code, quirks included, so that verdicts agree; `tests/unit/rewards/test_geneval_rules.py` states each one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float32, Int
from numpy.typing import NDArray

Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)

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
    """What a prompt asks for: every `include` clause must hold, and no `exclude` clause may be reached."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


@dataclass(frozen=True)
class Detections:
    """Objects found in one image, in any order.

    Attributes:
        boxes: corners x1, y1, x2, y2 in pixels, y down.
        labels: index of the class in `geneval_prompts.OBJECT_NAMES`.
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
        position: share of the two boxes' sizes that is taken off the distance between their centres.
        max_objects: objects kept of each class, the surest first.
    """

    score: float = 0.3
    counting_score: float = 0.9
    position: float = 0.1
    max_objects: int = 16


@dataclass(frozen=True)
class Verdict:
    """What the rules say of one image.

    Attributes:
        correct: GenEval's own verdict: at least `count` objects of each clause, judged on the surest `count`.
        strict: exactly `count` objects of each clause, judged on all of them (the reward server of Flow-GRPO).
        dense: mean partial credit of the clauses (the same server, trained on in Flow-GRPO): 1 when all hold. Negative
            when a class is found more than twice as often as asked for.
        reasons: why not `correct`; empty when it is.
    """

    correct: bool
    strict: bool
    dense: float
    reasons: tuple[str, ...]


Objects = Mapping[str, Sequence[int]]
"""Rows of `Detections` by class name, the surest first."""

ColorsOf = Callable[[str, Sequence[int]], Sequence[str]]
"""Colours of the objects in the given rows, which are of the given class."""


def kept_objects(
    found: Detections, names: Sequence[str], specification: Specification, thresholds: Thresholds
) -> dict[str, list[int]]:
    """The detections that count, by class name; classes without any are absent."""
    minimum = thresholds.counting_score if specification.tag == "counting" else thresholds.score
    # of equally sure objects the later one comes first, as in the published code
    order = np.argsort(found.scores, kind="stable")[::-1]
    objects: dict[str, list[int]] = {}
    for row in order[found.scores[order] > minimum]:
        rows = objects.setdefault(names[int(found.labels[row])], [])
        if len(rows) < thresholds.max_objects:
            rows.append(int(row))
    return objects


def relations(box: NDArray[np.float32], target: NDArray[np.float32], position_threshold: float) -> frozenset[Relation]:
    """How `box` lies to `target`; several relations hold on a diagonal, none when the centres are close.

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
        colors_of: asked only for clauses that name a colour and whose objects are there.
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
        """Every failed clause of GenEval's own rules; a clause looks at the surest `count` objects of its class."""
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
        """Strict verdict and dense score; a clause looks at all objects of its class, whose number must be exact.

        A clause earns `1 - |found - count| / count`, and with a colour the same for objects of that colour. A relation
        that fails earns 0 and then 1, one that holds 1, as in the published server. When the number is wrong, a colour
        or relation earns 0.
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
