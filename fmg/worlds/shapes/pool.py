"""Random pictures and their captions, right ones and the partly wrong ones that the base models learn from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fmg.worlds.shapes.prompts import phrasings, prompt_set
from fmg.worlds.shapes.render import place
from fmg.worlds.shapes.scene import COLORS, KINDS, POSITIONS, PlacedObject, Scene, single


@dataclass(frozen=True)
class CaptionedPicture:
    """What is drawn and what the caption says about it."""

    objects: tuple[PlacedObject, ...]
    caption: str


def random_scene(rng: np.random.Generator, hard_share: float) -> Scene:
    """A one-object scene, or with probability `hard_share` one of the hard prompts' scenes."""
    if rng.random() < hard_share:
        items = prompt_set("hard")
        return items[rng.integers(len(items))].scene
    return single(KINDS[rng.integers(4)], COLORS[rng.integers(5)], POSITIONS[rng.integers(5)])


def random_pictures(count: int, rng: np.random.Generator, hard_share: float) -> list[tuple[PlacedObject, ...]]:
    """Placed objects of `count` random scenes."""
    return [place(random_scene(rng, hard_share), rng) for _ in range(count)]


def captioned_pictures(
    count: int, rng: np.random.Generator, hard_share: float, wrong_share: float
) -> list[CaptionedPicture]:
    """Pictures with partly wrong captions, as in web data.

    In a one-object caption the colour and the position are each, independently and with probability `wrong_share`,
    replaced by a uniformly random value (which may be the right one). The kind and hard captions are always right.
    """
    pictures = []
    for _ in range(count):
        scene = random_scene(rng, hard_share)
        said = _misdescribe(scene, rng, wrong_share) if scene.tag == "single_object" else scene
        options = phrasings(said)
        pictures.append(CaptionedPicture(place(scene, rng), options[rng.integers(len(options))]))
    return pictures


def _misdescribe(scene: Scene, rng: np.random.Generator, wrong_share: float) -> Scene:
    clause = scene.include[0]
    if rng.random() < wrong_share:
        clause = replace(clause, color=COLORS[rng.integers(len(COLORS))])
    if rng.random() < wrong_share:
        clause = replace(clause, position=POSITIONS[rng.integers(len(POSITIONS))])
    return replace(scene, include=(clause,))
