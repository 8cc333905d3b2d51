"""Random signs and their captions: the right words, and the partly wrong ones that the base model learns from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fmg.worlds.text.render import Sign, random_sign
from fmg.worlds.text.words import LETTERS, SLOTS, quoted


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
    (which may be the right one), so the letter that a caption names is always the likeliest in the picture.
    """
    signs = []
    for _ in range(count):
        word = random_word(rng)
        options = quoted("".join(_misread(letter, rng, wrong_share) for letter in word))
        signs.append(CaptionedSign(random_sign(word, rng), options[rng.integers(len(options))]))
    return signs


def _misread(letter: str, rng: np.random.Generator, wrong_share: float) -> str:
    return LETTERS[rng.integers(len(LETTERS))] if rng.random() < wrong_share else letter
