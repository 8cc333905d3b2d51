"""A small CLIP of the shapes world: a differentiable reward, trained on renders (`fmg pretrain shapes-clip`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fmg.core.errors import CheckpointError, reason
from fmg.core.types import RewardOutput
from fmg.worlds.configs import ShapesClipConfig
from fmg.worlds.shapes.prompts import normalised, vocabulary
from fmg.worlds.shapes.rewards import ReadsPrompts, check_pixels
from fmg.worlds.shapes.scene import IMAGE_SIZE

WEIGHTS = "model.safetensors"
MAX_WORDS = 12
"""Words of the longest prompt."""
_CHANNELS = (32, 48, 64, 96)
_WORD, _HIDDEN, _WIDTH = 24, 128, 64


class ShapesClipNetwork(nn.Module):
    """Two towers with unit-length outputs of one width, and the scale and bias that turn their cosine into a logit.

    Images pass through four convolutions, prompts as the embeddings of their words, one after the other, through two
    layers. Every operation is smooth.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *_CHANNELS), _CHANNELS, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=1 if before == 3 else 2, padding=1), nn.GELU()]
        side = IMAGE_SIZE // 2 ** (len(_CHANNELS) - 1)
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(_CHANNELS[-1] * side**2, _WIDTH))
        self.words = nn.Embedding(len(vocabulary()) + 1, _WORD, padding_idx=0)
        self.text = nn.Sequential(
            nn.Flatten(), nn.Linear(MAX_WORDS * _WORD, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _WIDTH)
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-5.0))

    def images(self, images: Float[Tensor, "b 3 32 32"]) -> Float[Tensor, "b d"]:
        """Embeddings of images in [0, 1]."""
        return F.normalize(self.image(2 * images - 1), dim=-1)

    def prompts(self, words: Int[Tensor, "b w"]) -> Float[Tensor, "b d"]:
        """Embeddings of prompts as `word_ids` reads them."""
        return F.normalize(self.text(self.words(words)), dim=-1)

    def logit(self, cosine: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The logit of the probability that image and prompt match."""
        return self.logit_scale.exp() * cosine + self.logit_bias


def word_ids(prompts: Sequence[str]) -> Int[Tensor, "b w"]:
    """The words of prompts as indices, padded with 0 to `MAX_WORDS`."""
    known = _numbers()
    ids = torch.zeros(len(prompts), MAX_WORDS, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        words = [known[word] for word in normalised(prompt).split()]
        row[: len(words)] = torch.tensor(words)
    return ids


@lru_cache
def _numbers() -> dict[str, int]:
    return {word: number for number, word in enumerate(vocabulary(), 1)}


class ShapesClip(ReadsPrompts):
    """Cosine of image and prompt under `ShapesClipNetwork`; part `match`, the probability that they agree.

    Differentiable: scores of images that record gradients record them too.

    Raises:
        CheckpointError: the weights are missing or damaged.
    """

    def __init__(self, config: ShapesClipConfig) -> None:
        self.network = load_network(Path(str(files("fmg").joinpath("assets", "shapes-clip", WEIGHTS))))

    def __call__(self, images: Float[Tensor, "b 3 32 32"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1].

        Raises:
            RefusedImageError: for images of any other size.
            UsageError: for a prompt outside the grammar of the shapes world.
        """
        check_pixels("shapes-clip", images)
        self.check_prompts(prompts)
        network = self.network.to(images.device)
        words = word_ids(prompts).to(images.device)
        cosine = (network.images(images.to(network.words.weight.dtype)) * network.prompts(words)).sum(-1)
        return RewardOutput(cosine, {"match": network.logit(cosine).sigmoid()})


def load_network(path: Path) -> ShapesClipNetwork:
    """The network in a file, in fp32, without gradients for its weights.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    network = ShapesClipNetwork()
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}", "Install fmg again.") from error
    return network.eval().requires_grad_(False)
