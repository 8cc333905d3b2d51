from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from fmg.rewards.geneval_rules import (
    OBJECT_NAMES,
    Clause,
    Detections,
    Position,
    Specification,
    Thresholds,
    Verdict,
    judge,
    kept_objects,
    relations,
)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    name: str
    score: float = 0.95
    box: Box = (0, 0, 10, 10)
    color: str = "red"


def verdict(
    things: Sequence[Thing],
    asked: Specification,
    thresholds: Thresholds = Thresholds(),  # noqa: B008
) -> Verdict:
    found = Detections(
        np.array([thing.box for thing in things], dtype=np.float32).reshape(-1, 4),
        np.array([OBJECT_NAMES.index(thing.name) for thing in things], dtype=np.int64),
        np.array([thing.score for thing in things], dtype=np.float32),
        np.ones((len(things), 1, 1), dtype=bool),
    )

    def colors_of(name: str, rows: Sequence[int]) -> list[str]:
        assert all(things[row].name == name for row in rows)
        return [things[row].color for row in rows]

    return judge(found, OBJECT_NAMES, asked, colors_of, thresholds)


ONE_DOG = Specification("single_object", (Clause("dog", 1),))
DOG_AND_CAT = Specification("two_object", (Clause("dog", 1), Clause("cat", 1)))
THREE_DOGS = Specification("counting", (Clause("dog", 3),), (Clause("dog", 4),))
RED_DOG = Specification("colors", (Clause("dog", 1, "red"),))
CAT_LEFT_OF_DOG = Specification("position", (Clause("dog", 1), Clause("cat", 1, None, Position("left of", 0))))
RED_DOG_BLUE_CAT = Specification("color_attr", (Clause("dog", 1, "red"), Clause("cat", 1, "blue")))

LEFT: Box = (0, 40, 20, 60)
RIGHT: Box = (80, 40, 100, 60)
DOG, CAT = Thing("dog"), Thing("cat")
BLUE_CAT = Thing("cat", color="blue")

# what is seen, what is asked for, correct, strict, dense
TABLE = [
    ([DOG], ONE_DOG, True, True, 1.0),
    ([], ONE_DOG, False, False, 0.0),
    ([CAT], ONE_DOG, False, False, 0.0),
    # more than one is still correct, but not strictly
    ([DOG, DOG], ONE_DOG, True, False, 0.0),
    ([DOG] * 4, ONE_DOG, True, False, -2.0),
    # the threshold itself does not count
    ([Thing("dog", 0.3)], ONE_DOG, False, False, 0.0),
    ([Thing("dog", 0.31)], ONE_DOG, True, True, 1.0),
    ([DOG, CAT], DOG_AND_CAT, True, True, 1.0),
    ([DOG], DOG_AND_CAT, False, False, 0.5),
    ([CAT, CAT], DOG_AND_CAT, False, False, 0.0),
    ([DOG] * 3, THREE_DOGS, True, True, 1.0),
    ([DOG] * 2, THREE_DOGS, False, False, 2 / 3),
    # `exclude` makes counting exact
    ([DOG] * 4, THREE_DOGS, False, False, 2 / 3),
    ([DOG] * 5, THREE_DOGS, False, False, 1 / 3),
    # counting asks for more certainty: the unsure fourth dog is not there
    ([DOG] * 3 + [Thing("dog", 0.9)], THREE_DOGS, True, True, 1.0),
    ([DOG] * 3 + [Thing("dog", 0.91)], THREE_DOGS, False, False, 2 / 3),
    ([DOG], RED_DOG, True, True, 1.0),
    ([Thing("dog", color="blue")], RED_DOG, False, False, 0.5),
    # only the surest one is asked for its colour
    ([Thing("dog", 0.9, color="blue"), Thing("dog", 0.8)], RED_DOG, False, False, 0.0),
    ([Thing("dog", 0.8, color="blue"), Thing("dog", 0.9)], RED_DOG, True, False, 0.0),
    ([], RED_DOG, False, False, 0.0),
    ([Thing("cat", box=LEFT), Thing("dog", box=RIGHT)], CAT_LEFT_OF_DOG, True, True, 1.0),
    # a relation that fails earns 0 and then 1, as published
    ([Thing("cat", box=RIGHT), Thing("dog", box=LEFT)], CAT_LEFT_OF_DOG, False, False, 0.75),
    ([Thing("cat", box=LEFT)], CAT_LEFT_OF_DOG, False, False, 1 / 3),
    ([Thing("dog", box=RIGHT)], CAT_LEFT_OF_DOG, False, False, 1 / 3),
    # a second cat, less sure, on the wrong side
    (
        [Thing("cat", box=LEFT), Thing("dog", 0.9, (50, 40, 70, 60)), Thing("cat", 0.5, RIGHT)],
        CAT_LEFT_OF_DOG,
        True,
        False,
        1 / 3,
    ),
    ([DOG, BLUE_CAT], RED_DOG_BLUE_CAT, True, True, 1.0),
    ([Thing("dog", color="blue"), CAT], RED_DOG_BLUE_CAT, False, False, 0.5),
    ([DOG], RED_DOG_BLUE_CAT, False, False, 0.5),
]


@pytest.mark.parametrize(("things", "asked", "correct", "strict", "dense"), TABLE)
def test_verdicts(things: list[Thing], asked: Specification, correct: bool, strict: bool, dense: float) -> None:
    found = verdict(things, asked)
    assert (found.correct, found.strict, found.dense) == (correct, strict, pytest.approx(dense))
    assert bool(found.reasons) is not correct


def test_the_order_of_detections_does_not_matter() -> None:
    things = [Thing("dog", 0.8, color="blue"), Thing("cat", 0.7), Thing("dog", 0.9)]
    assert verdict(things, RED_DOG) == verdict(things[::-1], RED_DOG)


def test_more_than_sixteen_objects_of_a_class_are_invisible_to_exclude() -> None:
    many = Specification("counting", (Clause("dog", 1),), (Clause("dog", 17),))
    assert verdict([DOG] * 30, many).correct
    assert not verdict([DOG] * 30, many, Thresholds(max_objects=17)).correct


def test_the_surest_objects_are_kept() -> None:
    scores = np.linspace(0.4, 0.9, 30).astype(np.float32)
    found = Detections(np.zeros((30, 4), np.float32), np.zeros(30, np.int64), scores, np.ones((30, 1, 1), bool))
    kept = kept_objects(found, OBJECT_NAMES, ONE_DOG, Thresholds())
    assert kept == {"person": list(range(29, 13, -1))}


def at(x: float, y: float, side: float = 10) -> np.ndarray:  # type: ignore[type-arg]
    return np.array([x - side / 2, y - side / 2, x + side / 2, y + side / 2], dtype=np.float32)


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-50, 0, {"left of"}),
        (50, 0, {"right of"}),
        (0, -50, {"above"}),
        (0, 50, {"below"}),
        (40, 40, {"right of", "below"}),
        (-40, 40, {"left of", "below"}),
        (50, 10, {"right of"}),
        (0, 0, set()),
        # the sum of both sizes is 20, so 2 pixels are taken off: up to there no relation holds
        (2, 0, set()),
        # 2 of 4 pixels are left: exactly half, which is not more than half
        (4, 0, set()),
        (4.1, 0, {"right of"}),
    ],
)
def test_relations_and_the_position_threshold(dx: float, dy: float, expected: set[str]) -> None:
    assert relations(at(100 + dx, 100 + dy), at(100, 100), 0.1) == expected


def test_a_larger_position_threshold_needs_more_distance() -> None:
    assert relations(at(15, 0), at(0, 0), 0.1) == {"right of"}
    assert relations(at(15, 0), at(0, 0), 0.5) == frozenset()


def test_every_pair_must_stand_in_the_relation() -> None:
    asked = Specification("position", (Clause("dog", 2), Clause("cat", 1, None, Position("left of", 0))))
    cat, right = Thing("cat", box=(40, 40, 60, 60)), Thing("dog", box=RIGHT)
    assert verdict([cat, right, right], asked).correct
    assert not verdict([cat, right, Thing("dog", box=LEFT)], asked).correct


def test_a_failed_target_fails_the_relation() -> None:
    asked = Specification("position", (Clause("dog", 1, "blue"), Clause("cat", 1, None, Position("left of", 0))))
    found = verdict([Thing("cat", box=LEFT), Thing("dog", box=RIGHT)], asked)
    assert not found.correct
    assert found.reasons == ("expected blue dog>=1, found red", "no target for cat to be left of")
    assert found.dense == pytest.approx((1 + 0 + 1 + 0) / 4)
