from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from fmg.worlds.shapes.prompts import SPLITS, parse_prompt, prompt_set
from fmg.worlds.shapes.scene import COLORS, KINDS, POSITIONS, PlacedObject, place, render
from fmg.worlds.shapes.verifier import blank, detect, quality, verify

COUNT = 600


def _drawn(split: str, seed: int = 0):
    rng = np.random.default_rng(seed)
    items = prompt_set(split)
    scenes = [items[i].scene for i in rng.integers(len(items), size=COUNT)]
    return render([place(scene, rng) for scene in scenes]), scenes


@pytest.mark.parametrize("split", SPLITS)
def test_true_renders_pass_and_shuffled_captions_fail(split: str) -> None:
    images, scenes = _drawn(split)
    assert verify(images, scenes).strict.mean() >= 0.98
    shuffled = [scenes[i] for i in np.random.default_rng(1).permutation(COUNT)]
    assert verify(images, shuffled).strict.mean() <= 0.06


def test_true_renders_of_one_object_have_quality_near_one() -> None:
    parts = quality(_drawn("train")[0])
    assert parts.total.mean() >= 0.98
    assert min(parts.sharpness.min(), parts.palette_fidelity.min()) >= 0.8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("color", COLORS)
def test_detection_reads_kind_color_and_place(kind, color) -> None:
    target = PlacedObject(kind, color, 9.3, 22.6, 12.4)
    (objects,) = detect(render([[target]]))
    (found,) = objects
    assert (found.kind, found.color) == (kind, color)
    assert np.hypot(found.center[0] - target.x, found.center[1] - target.y) <= 1.0
    assert found.confidence >= 0.9


@pytest.mark.parametrize("attribute", ["color", "shape", "position"])
def test_one_wrong_attribute_costs_exactly_that_part(attribute: str) -> None:
    drawn = {
        "color": PlacedObject("circle", "blue", 9, 16, 13),
        "shape": PlacedObject("square", "red", 9, 16, 13),
        "position": PlacedObject("circle", "red", 23, 16, 13),
    }[attribute]
    verdict = verify(render([[drawn]]), [parse_prompt("a red circle on the left")])
    for part in ("color", "shape", "position", "count"):
        assert getattr(verdict, part)[0] == (part != attribute)
    assert verdict.soft[0] == pytest.approx(0.75)
    assert verdict.strict[0] == 0


def test_something_else_in_the_picture_fails_count_and_strict() -> None:
    objects = [PlacedObject("circle", "red", 9, 16, 12), PlacedObject("cross", "green", 24, 16, 10)]
    verdict = verify(render([objects]), [parse_prompt("a red circle on the left")])
    assert (verdict.color[0], verdict.count[0], verdict.strict[0]) == (1, 0, 0)


def test_counting_is_exact() -> None:
    scene = parse_prompt("two red circles")
    for count, right in ((1, 0), (2, 1), (3, 0)):
        objects = [PlacedObject("circle", "red", x, y, 9) for x, y in ((9, 9), (23, 9), (16, 23))[:count]]
        assert verify(render([objects]), [scene]).strict[0] == right


@pytest.mark.parametrize(("x", "y", "held"), [(23, 16, "left of"), (9, 16, "right of"), (16, 25, "above")])
def test_relations(x: float, y: float, held: str) -> None:
    first = PlacedObject("circle", "red", 32 - x, 32 - y, 8)
    images = render([[first, PlacedObject("square", "blue", x, y, 8)]])
    for direction in ("left of", "right of", "above", "below"):
        scene = parse_prompt(f"a red circle {direction} a blue square")
        assert verify(images, [scene]).position[0] == (direction == held)


def test_blank_pictures_score_zero() -> None:
    scenes = [parse_prompt(f"a red circle {place}") for place in ("on the left", "at the top")]
    verdict, parts = verify(blank(2), scenes), quality(blank(2))
    assert verdict.soft.max() == 0
    assert parts.total.max() == 0


def test_blur_lowers_sharpness_and_a_foreign_colour_lowers_fidelity() -> None:
    images = _drawn("train")[0]
    true, blurred = quality(images), quality(ndimage.gaussian_filter(images, (0, 0, 1.2, 1.2)))
    assert blurred.sharpness.mean() < true.sharpness.mean() - 0.25
    assert quality(images * 0.8).palette_fidelity.mean() < true.palette_fidelity.mean() - 0.25


def test_a_two_coloured_hybrid_is_not_recognisable() -> None:
    images = render([[PlacedObject("circle", "red", 16, 16, 14)]])
    images[0, :, :, :16] = render([[PlacedObject("circle", "blue", 16, 16, 14)]])[0, :, :, :16]
    assert quality(images).recognisable[0] == 0


def test_position_is_the_nearest_anchor() -> None:
    for position in POSITIONS:
        scene = parse_prompt(next(i.prompt for i in prompt_set("train") if i.scene.include[0].position == position))
        rng = np.random.default_rng(0)
        (objects,) = detect(render([place(scene, rng)]))
        assert objects[0].position == position
