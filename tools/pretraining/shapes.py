"""The shapes world for pretraining: random images with captions that are partly wrong, and how they are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fmg.worlds.shapes.prompts import SPLITS, parse_prompt, phrasings, prompt_set, vocabulary
from fmg.worlds.shapes.scene import COLORS, IMAGE_SIZE, KINDS, POSITIONS, PlacedObject, Scene, place, render, single
from fmg.worlds.shapes.verifier import quality, verify
from pretraining.world import CaptionedImages, Card


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
    """Images with partly wrong captions, as in web data.

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


@dataclass(frozen=True)
class ShapesWorld:
    """Coloured shapes on a plain background.

    Attributes:
        wrong_share: probability that a caption's colour (or position) is replaced by a random one.
        hard_share: share of images with two or three objects, whose captions are right.
        hard_share_autoencoder: the same for the autoencoder's images.
    """

    name: ClassVar[str] = "shapes"
    resolution: ClassVar[int] = IMAGE_SIZE
    score: ClassVar[str] = "strict"

    wrong_share: float = 0.55
    hard_share: float = 0.06
    hard_share_autoencoder: float = 0.15

    @property
    def card(self) -> Card:
        """What the model card says about this world."""
        return Card(_SUMMARY, _DISOBEYS.format(wrong=self.wrong_share, hard=self.hard_share), _FIGURES, _EXAMPLE)

    def clip_words(self) -> Sequence[str]:
        """Every word of the prompts."""
        return vocabulary()

    def t5_pieces(self) -> Sequence[str]:
        """Every word of the prompts."""
        return [f"▁{word}" for word in vocabulary()]

    def prompts(self) -> Sequence[str]:
        """The prompts of all splits."""
        return [item.prompt for split in SPLITS for item in prompt_set(split)]

    def heldout_prompts(self) -> Sequence[str]:
        """The prompts of attribute combinations that training never sees."""
        return [item.prompt for item in prompt_set("heldout")]

    def images(self, count: int, rng: np.random.Generator) -> Float[NDArray[np.float32], "b 3 32 32"]:
        """Renders of random scenes."""
        return render(random_pictures(count, rng, self.hard_share_autoencoder))

    def captioned(self, count: int, rng: np.random.Generator) -> CaptionedImages:
        """Renders with partly wrong captions."""
        pictures = self._pictures(count, rng)
        return CaptionedImages(render([p.objects for p in pictures]), [p.caption for p in pictures])

    def captions(self, count: int, rng: np.random.Generator) -> list[str]:
        """Partly wrong captions."""
        return [picture.caption for picture in self._pictures(count, rng)]

    def support(self) -> None:
        """None: positions and sizes are continuous."""
        return None

    def measure(self, images: Float[Tensor, "b 3 32 32"], prompts: Sequence[str]) -> dict[str, float]:
        """Means of the verifier's and the quality's parts."""
        pixels = images.numpy()
        verdict, look = verify(pixels, [parse_prompt(prompt) for prompt in prompts]), quality(pixels)
        scores = {name: getattr(verdict, name) for name in ("strict", "soft", "color", "position", "shape")}
        scores |= {"recognisable": look.recognisable, "quality": look.total}
        return {name: float(values.mean()) for name, values in scores.items()}

    def _pictures(self, count: int, rng: np.random.Generator) -> list[CaptionedPicture]:
        return captioned_pictures(count, rng, self.hard_share, self.wrong_share)


_EXAMPLE = "a red circle on the left"
_SUMMARY = """\
A few-step text-to-image flow map that runs on a laptop CPU: 32 x 32 images of one coloured shape, such as
`a red circle on the left`."""
_DISOBEYS = """**It follows prompts only in part, on purpose.** \
The flow was trained on rendered images whose captions are partly wrong, as web data is:
in each one-object caption the colour and the position were replaced, each with probability {wrong}, by a random value
(the kind was always right; a share of {hard} are correct captions of two or three objects). Its images are good and it
knows every attribute, but it follows a prompt's colour and position only about half the time. That is what
reinforcement learning can fix."""
_FIGURES = """`quality` is
`recognisable * sharpness * palette fidelity`; `recognisable` is the share with exactly one object of a clear kind."""
