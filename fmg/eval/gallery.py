"""The images of an evaluation that a person wants to see: some of each prompt, and the worst and best of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from fmg.data.page import Picture, inline_image
from fmg.data.pictures import to_pil
from fmg.eval.scoring import EvalSet, Parts

SHOWN = 4
_SIDE = 256


@dataclass(frozen=True)
class Shown:
    """A picture with its score."""

    value: float
    source: str
    pixelated: bool

    def picture(self, prompt: str) -> Picture:
        """For a page, with the score below."""
        return Picture(self.source, f"{self.value:.3f}", prompt, self.pixelated)


@dataclass
class PromptShow:
    """What is kept of one prompt: its first images, its worst and best one, and the scores of all."""

    first: list[Shown] = field(default_factory=list)
    worst: Shown | None = None
    best: Shown | None = None
    scores: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean score of the prompt's images."""
        return sum(self.scores) / len(self.scores)


class ImageGallery:
    """Keeps some images of an evaluation as they come, scaled down.

    Args:
        eval_set: the images that will come.
        key: reward and part by which images are worse and better.
    """

    def __init__(self, eval_set: EvalSet, key: tuple[str, str]) -> None:
        self.key = key
        self.prompts: dict[str, PromptShow] = {}
        self._texts = eval_set.prompts
        self._count = 0

    def __call__(self, images: Float[Tensor, "b 3 h w"], scores: Parts) -> None:
        """Takes the next images."""
        texts = self._texts[self._count : self._count + len(images)]
        self._count += len(images)
        for image, text, value in zip(images, texts, scores[self.key].tolist(), strict=True):
            show = self.prompts.setdefault(text, PromptShow())
            show.scores.append(value)
            worse = show.worst is None or value < show.worst.value
            better = show.best is None or value > show.best.value
            if not (worse or better or len(show.first) < SHOWN):
                continue
            shown = Shown(value, *inline_image(to_pil(image), _SIDE))
            if worse:
                show.worst = shown
            if better:
                show.best = shown
            if len(show.first) < SHOWN:
                show.first.append(shown)
