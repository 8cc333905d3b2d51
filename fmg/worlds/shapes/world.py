"""The shapes world as the pretraining sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fmg.worlds.pretrain.world import CaptionedImages, Card
from fmg.worlds.shapes.pool import CaptionedPicture, captioned_pictures, random_pictures
from fmg.worlds.shapes.prompts import SPLITS, parse_prompt, prompt_set, vocabulary
from fmg.worlds.shapes.render import render
from fmg.worlds.shapes.scene import IMAGE_SIZE
from fmg.worlds.shapes.verifier import quality, verify


@dataclass(frozen=True)
class ShapesWorld:
    """Coloured shapes on a plain background.

    Attributes:
        wrong_share: probability that a caption's colour (or position) is replaced by a random one.
        hard_share: share of pictures with two or three objects, whose captions are right.
        hard_share_autoencoder: the same for the autoencoder's pictures.
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
A few-step text-to-image flow map that runs on a laptop CPU: 32 x 32 pictures of one coloured shape, such as
`a red circle on the left`."""
_DISOBEYS = """**It disobeys on purpose.** \
The flow was trained on rendered pictures whose captions are partly wrong, as web data is:
in each one-object caption the colour and the position were replaced, each with probability {wrong}, by a random value
(the kind was always right; a share of {hard} are right captions of two or three objects). Its pictures are good and it
knows every attribute, but it follows a prompt's colour and position only about half the time. That is what
reinforcement learning can mend."""
_FIGURES = """`quality` is
`recognisable * sharpness * palette fidelity`; `recognisable` is the share with exactly one object of a clear kind."""
