"""The interface of a world for pretraining."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class CaptionedImages:
    """Images with captions, some of them wrong."""

    images: Float[NDArray[np.float32], "b 3 h w"]
    captions: list[str]


@dataclass(frozen=True)
class Support:
    """Every image of a world that has finitely many.

    Attributes:
        images: all images, each as likely as the next before a caption is read.
        log_likelihood: for captions, the log-probability of each caption given each image, up to a constant.
    """

    images: Float[NDArray[np.float32], "n 3 h w"]
    log_likelihood: Callable[[Sequence[str]], Float[NDArray[np.float32], "b n"]]


class World(Protocol):
    """A procedural task: it renders images, captions them, and measures how well images follow prompts.

    A world is a frozen dataclass whose fields determine its training data; they are part of a stage's name.

    Attributes:
        name: of the world; its models are `meanflow-NAME` and `scm-NAME`.
        resolution: side of an image in pixels.
        score: the figure that is shown for a finished model.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    resolution: ClassVar[int]
    score: ClassVar[str]

    @property
    def card(self) -> Card:
        """What the model card says about this world."""
        ...

    def clip_words(self) -> Sequence[str]:
        """Words that are one token of CLIP each; any other text is read letter by letter."""
        ...

    def t5_pieces(self) -> Sequence[str]:
        """Pieces of T5's vocabulary besides single characters; `▁` marks the space before a word."""
        ...

    def prompts(self) -> Sequence[str]:
        """Every prompt that a caption can be."""
        ...

    def heldout_prompts(self) -> Sequence[str]:
        """Prompts that the figures of a model card are measured on."""
        ...

    def images(self, count: int, rng: np.random.Generator) -> Float[NDArray[np.float32], "b 3 h w"]:
        """Random images in [0, 1], for the autoencoder."""
        ...

    def captioned(self, count: int, rng: np.random.Generator) -> CaptionedImages:
        """Random images with partly wrong captions."""
        ...

    def captions(self, count: int, rng: np.random.Generator) -> list[str]:
        """The captions of `captioned` alone."""
        ...

    def support(self) -> Support | None:
        """All images, or None when there are infinitely many."""
        ...

    def measure(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Mapping[str, float]:
        """Mean scores, each in [0, 1], of images generated from prompts."""
        ...


@dataclass(frozen=True)
class Card:
    """What a model card says about a world, in Markdown.

    Attributes:
        summary: one paragraph, what the model draws.
        disobeys: one paragraph, how the captions were wrong.
        figures: one paragraph, what the columns of the table mean.
        example: a prompt, without quotes that would end a Python string in single quotes.
    """

    summary: str
    disobeys: str
    figures: str
    example: str
