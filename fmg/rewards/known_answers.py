"""Pictures that are drawn, not shipped, and the scores that rewards are known to give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fmg.rewards.service.wire import probe_image

Picture = Float[Tensor, "3 h w"]

_MADE_HERE = "computed by fmg 0.1 with rapidocr 3.10.0, onnxruntime 1.32, Pillow 13.0 on x86-64"


@dataclass(frozen=True)
class KnownAnswer:
    """A score that a reward must reproduce.

    Attributes:
        picture: name in `PICTURES`.
        prompt: what it is scored against.
        value: the expected score.
        tolerance: how far it may be off: rounding, and what versions of the libraries in `origin` are known to change.
        origin: where the value comes from.
        part: which score; `total` or the name of a part.
        options: of the reward; the defaults when empty.
    """

    picture: str
    prompt: str
    value: float
    tolerance: float
    origin: str
    part: str = "total"
    options: Mapping[str, object] = field(default_factory=dict)


def gradient() -> Picture:
    """Ramps in red and green and a blue square, 32 x 32."""
    return probe_image()[0]


def white() -> Picture:
    """Nothing, 64 x 128."""
    return torch.ones(3, 64, 128)


def sign() -> Picture:
    """HELLO in black on white, 64 x 128, in the font that comes with Pillow."""
    picture = Image.new("RGB", (128, 64), "white")
    ImageDraw.Draw(picture).text((64, 32), "HELLO", "black", ImageFont.load_default(36), anchor="mm")
    return _tensor(picture)


def disc() -> Picture:
    """A red disc at the left of a light picture of 32 x 32, as the shapes world draws it."""
    scale = 8
    picture = Image.new("RGB", (32 * scale, 32 * scale), (240, 240, 235))
    ImageDraw.Draw(picture).ellipse([3 * scale, 10 * scale, 15 * scale, 22 * scale], fill=(215, 40, 40))
    return _tensor(picture.resize((32, 32), Image.Resampling.BOX))


def tag() -> Picture:
    """CAT in the dark ink of the text world on white, 24 x 24, each letter in its slot."""
    picture = Image.new("RGB", (24, 24), "white")
    for x, letter in zip((4, 12, 20), "CAT", strict=True):
        ImageDraw.Draw(picture).text((x, 12), letter, (20, 20, 30), ImageFont.load_default(12), anchor="mm")
    return _tensor(picture)


def blank_tag() -> Picture:
    """Nothing, 24 x 24."""
    return torch.ones(3, 24, 24)


PICTURES: Mapping[str, Callable[[], Picture]] = MappingProxyType(
    {"gradient": gradient, "white": white, "sign": sign, "disc": disc, "tag": tag, "blank tag": blank_tag}
)

KNOWN_ANSWERS: Mapping[str, tuple[KnownAnswer, ...]] = MappingProxyType(
    {
        "ocr": (
            KnownAnswer("sign", 'a sign that says "Hello"', 1.0, 1e-6, "the rule: the text is there, case aside"),
            KnownAnswer("sign", 'a sign that says "JELLO"', 0.8, 1e-6, "the rule: one of five letters is wrong"),
            KnownAnswer("white", 'a sign that says "HELLO"', 0.0, 1e-6, "the rule: nothing can be read"),
        ),
        "ocr-logp": (
            KnownAnswer("sign", 'a sign that says "HELLO"', 0.0, 0.05, _MADE_HERE),
            KnownAnswer("sign", 'a sign that says "HELLO"', 1.0, 1e-6, _MADE_HERE, part="exact"),
            KnownAnswer("white", 'a sign that says "HELLO"', -11.840, 0.5, _MADE_HERE),
        ),
        "jpeg-incompressibility": (KnownAnswer("gradient", "anything", 1.028, 0.05, _MADE_HERE),),
        "jpeg-compressibility": (KnownAnswer("gradient", "anything", -0.002056, 0.0001, _MADE_HERE),),
        "shapes": (
            KnownAnswer("disc", "a red circle", 1.0, 1e-6, "the rule: it is what the prompt says", part="strict"),
            KnownAnswer("disc", "a blue circle", 0.0, 1e-6, "the rule: the colour is wrong", part="strict"),
        ),
        "shapes-quality": (
            KnownAnswer("disc", "a red circle", 1.0, 1e-6, "the rule: one object", part="recognisable"),
        ),
        "text-fidelity": (
            KnownAnswer("tag", "anything", 1.0, 0.01, "the rule: a printed sign and nothing else"),
            KnownAnswer("blank tag", "anything", 0.0, 1e-6, "the rule: without ink there is no contrast"),
        ),
    }
)


def _tensor(picture: Image.Image) -> Picture:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
