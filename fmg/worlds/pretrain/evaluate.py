"""Few-step sampling and the figures of a model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor

from fmg.worlds.pretrain.autoencoder import decode
from fmg.worlds.pretrain.flow import CHANNELS, TOKENS, ConditionalNet
from fmg.worlds.pretrain.text import PromptTable, Tokenizers
from fmg.worlds.shapes.prompts import PromptItem
from fmg.worlds.shapes.verifier import quality, verify


@dataclass(frozen=True)
class Figures:
    """Means over evaluation images, each in [0, 1]."""

    strict: float
    soft: float
    color: float
    position: float
    shape: float
    recognisable: float
    quality: float

    def as_dict(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


@torch.no_grad()
def sample(
    net: ConditionalNet, condition: tuple[Tensor, Tensor], steps: int, generator: torch.Generator
) -> Float[Tensor, "b tokens channels"]:
    """Deterministic flow-map sampling on the uniform grid, or multistep consistency sampling of a single-time map."""
    count = len(condition[0])
    single_time = net.transformer.config.second_time == "none"
    x = torch.randn(count, TOKENS, CHANNELS, generator=generator)
    for k in range(steps, 0, -1):
        t, s = torch.full((count,), k / steps), torch.full((count,), (k - 1) / steps)
        if single_time:
            clean = x - k / steps * net(x, t, None, condition)
            x = torch.lerp(clean, torch.randn(x.shape, generator=generator), (k - 1) / steps)
        else:
            x = x - net(x, t, s, condition) / steps
    return x


@torch.no_grad()
def sample_images(
    net: ConditionalNet,
    autoencoder: AutoencoderTiny,
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    steps: int,
    seed: int,
) -> Float[Tensor, "b 3 32 32"]:
    """Images in [0, 1] for prompts."""
    table = PromptTable.of(prompts, tokenizers)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for rows in torch.split(table.index(prompts), 500):
        images.append(decode(autoencoder, sample(net, net.encode(table, rows), steps, generator)))
    return torch.cat(images)


def measure(images: Float[Tensor, "b 3 32 32"], items: Sequence[PromptItem]) -> Figures:
    """Verifier and quality means of images that answer `items`."""
    pixels = images.numpy()
    verdict, look = verify(pixels, [item.scene for item in items]), quality(pixels)
    return Figures(
        strict=float(verdict.strict.mean()),
        soft=float(verdict.soft.mean()),
        color=float(verdict.color.mean()),
        position=float(verdict.position.mean()),
        shape=float(verdict.shape.mean()),
        recognisable=float(look.recognisable.mean()),
        quality=float(look.total.mean()),
    )
