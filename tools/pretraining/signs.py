"""The text world for pretraining: random signs with captions that are partly wrong, and how they are scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fmg.rewards.configs import OcrLogpConfig
from fmg.rewards.ocr import OcrLogp, quoted_text
from fmg.worlds.text.fidelity import fidelity
from fmg.worlds.text.prompts import LETTERS, SLOTS, every_word, prompt_set, quoted, vocabulary
from fmg.worlds.text.render import BOARD_RGB, IMAGE_SIZE, Sign, random_sign, render
from pretraining.world import CaptionedImages, Card, Support


@dataclass(frozen=True)
class CaptionedSign:
    """What is drawn and what the caption says about it."""

    sign: Sign
    caption: str


def random_word(rng: np.random.Generator) -> str:
    """`SLOTS` independent, uniformly random letters."""
    return "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=SLOTS))


def captioned_signs(count: int, rng: np.random.Generator, wrong_share: float) -> list[CaptionedSign]:
    """Signs with partly wrong captions, as in web data.

    Each letter of a caption is replaced, independently and with probability `wrong_share`, by a uniformly random one
    (which may be the right one), so the letter that a caption names is always the likeliest in the image.
    """
    signs = []
    for _ in range(count):
        word = random_word(rng)
        options = quoted("".join(_misread(letter, rng, wrong_share) for letter in word))
        signs.append(CaptionedSign(random_sign(word, rng), options[rng.integers(len(options))]))
    return signs


def _misread(letter: str, rng: np.random.Generator, wrong_share: float) -> str:
    return LETTERS[rng.integers(len(LETTERS))] if rng.random() < wrong_share else letter


@dataclass(frozen=True)
class TextWorld:
    """Signs of three letters.

    Attributes:
        wrong_share: probability that a letter of a caption is replaced by a random one.
    """

    name: ClassVar[str] = "text"
    resolution: ClassVar[int] = IMAGE_SIZE
    score: ClassVar[str] = "exact"

    wrong_share: float = 0.35

    def __post_init__(self) -> None:
        if not 0 < self.wrong_share < 1:
            raise ValueError(f"wrong_share is {self.wrong_share} and must be between 0 and 1")

    @property
    def card(self) -> Card:
        """What the model card says about this world."""
        return Card(_SUMMARY, _DISOBEYS.format(wrong=self.wrong_share, letters=len(LETTERS)), _FIGURES, _EXAMPLE)

    def clip_words(self) -> Sequence[str]:
        """None: pieces learnt from the words around the quote would cut quoted words as well."""
        return ()

    def t5_pieces(self) -> Sequence[str]:
        """The words around the quote, and letters with the quotes: so the first and the last letter of a word are other
        tokens than the one between, and a token says what to draw and where."""
        return [*(f"▁{word}" for word in vocabulary()), *(f'▁"{x}' for x in LETTERS), *(f'{x}"' for x in LETTERS)]

    def prompts(self) -> Sequence[str]:
        """Every string of letters in every template."""
        return [prompt for word in every_word() for prompt in quoted(word)]

    def heldout_prompts(self) -> Sequence[str]:
        """The prompts whose words reinforcement learning never sees."""
        return prompt_set("heldout")

    def images(self, count: int, rng: np.random.Generator) -> Float[NDArray[np.float32], "b 3 24 24"]:
        """Renders of random letters."""
        return render([random_sign(random_word(rng), rng) for _ in range(count)])

    def captioned(self, count: int, rng: np.random.Generator) -> CaptionedImages:
        """Renders with partly wrong captions."""
        signs = captioned_signs(count, rng, self.wrong_share)
        return CaptionedImages(render([s.sign for s in signs]), [s.caption for s in signs])

    def captions(self, count: int, rng: np.random.Generator) -> list[str]:
        """Partly wrong captions."""
        return [sign.caption for sign in captioned_signs(count, rng, self.wrong_share)]

    def support(self) -> Support:
        """Every string of letters on every board."""
        words = every_word()
        signs = [Sign(word, board) for word in words for board in range(len(BOARD_RGB))]
        letters = np.repeat(_letters(words), len(BOARD_RGB), axis=0)
        other = self.wrong_share / len(LETTERS)
        odds = math.log((1 - self.wrong_share + other) / other)

        def log_likelihood(captions: Sequence[str]) -> Float[NDArray[np.float32], "b n"]:
            said = _letters([quoted_text(caption) for caption in captions])
            right = (said[:, None] == letters).sum(-1, dtype=np.float32)
            scores: NDArray[np.float32] = np.float32(odds) * right
            return scores

        return Support(render(signs), log_likelihood)

    def measure(self, images: Float[Tensor, "b 3 24 24"], prompts: Sequence[str]) -> dict[str, float]:
        """Means of what the recogniser reads and of the fidelity.

        Raises:
            MissingDependencyError: without the packages of `flow-map-grpo[ocr]`.
        """
        read = OcrLogp(OcrLogpConfig())(images, prompts)
        scores = {"exact": read.parts["exact"].numpy(), "probability": read.parts["probability"].numpy()}
        scores["fidelity"] = fidelity(images.numpy()).total
        return {name: float(values.mean()) for name, values in scores.items()}


def _letters(words: Sequence[str]) -> NDArray[np.int64]:
    """Numbers (b, SLOTS) of the letters of words."""
    return np.array([[LETTERS.index(letter) for letter in word] for word in words], dtype=np.int64)


_EXAMPLE = 'a sign that says "CAT"'
_SUMMARY = """A few-step text-to-image flow map that runs on a laptop CPU: 24 x 24 images of three letters, such as
`a sign that says "CAT"`."""
_DISOBEYS = """**It follows prompts only in part, on purpose.** \
The flow was trained on rendered signs of random letters whose captions are partly wrong, as web data is:
each letter of a caption was replaced, with probability {wrong}, by one of the {letters} letters at random. It draws
every letter well in every place, but each is the requested one only about two times in three. That is what
reinforcement learning can fix."""
_FIGURES = """`exact` is the share that the
recogniser of the reward `ocr-logp` reads as the quoted word, `probability` its mean probability per letter, `fidelity`
the mean of the reward `text-fidelity`."""
