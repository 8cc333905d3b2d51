"""Feature extractors: the image itself for the embedded worlds, and networks for everything else.

Maps of a network follow LPIPS (Zhang et al., arXiv 1801.03924, eq. 1) with transformer layers in place of convolutions
and uniform weights in place of learned ones: channels scaled to unit length at each position, squared differences
averaged over positions and layers. The figures are comparable with each other, not with published LPIPS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fmg.core.errors import UsageError
from fmg.core.types import ImageFeatures
from fmg.eval.configs import ClipFeaturesConfig, Dinov2Config, PixelsConfig
from fmg.rewards.configs import NetworkConfig
from fmg.rewards.images import CLIP_MEAN, CLIP_STD, check_drawable, normalize, resize_and_crop
from fmg.rewards.network import Files, LazyNetwork, Load

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LAYERS = 4
_PLACES = 8

Extract = Callable[[Float[Tensor, "b 3 h w"]], ImageFeatures]


class Pixels:
    """Pixels averaged to `side` x `side`. The distance of maps is the mean squared difference over pixels and channels.

    Vectors are the same numbers relative to grey, so that their cosine distance compares contrasts.
    """

    def __init__(self, config: PixelsConfig) -> None:
        self._side = config.side

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> ImageFeatures:
        """Features of images in [0, 1]."""
        check_drawable(images)
        flat = F.adaptive_avg_pool2d(images.detach().float().cpu(), self._side).flatten(1)
        return ImageFeatures(vectors=flat - 0.5, maps=flat / flat.shape[1] ** 0.5)


class NetworkExtractor:
    """A feature extractor whose network is loaded when it is first needed.

    Args:
        name: registered name, for messages.
        config: which weights, device, dtype and batch size.
        load: makes the extracting function; it gets at most `batch_size` images per call.
    """

    def __init__(self, name: str, config: NetworkConfig, load: Load[Extract]) -> None:
        self.config = config
        self._network: LazyNetwork[Extract] = LazyNetwork("feature-extractor", name, config, load)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> ImageFeatures:
        """Features of images in [0, 1]. The first call loads the network to the device of its images."""
        extract = self._network.get(images.device)
        parts = [extract(batch) for batch in torch.split(images, self.config.batch_size)]
        return ImageFeatures(
            vectors=torch.cat([part.vectors.float().cpu() for part in parts]),
            maps=torch.cat([part.maps.float().cpu() for part in parts]),
        )


def clip(config: ClipFeaturesConfig) -> NetworkExtractor:
    """The projected image embedding of unit length, and patch tokens, with the preprocessing of OpenAI's CLIP."""
    return NetworkExtractor("clip", config, _load_clip)


def dinov2(config: Dinov2Config) -> NetworkExtractor:
    """The class token after the last norm, as Stein et al. use it, and patch tokens.

    Images are rounded to 8 bits, resized so that the shorter edge is `side` (Pillow's bicubic filter), and
    centre-cropped.
    """
    return NetworkExtractor("dinov2", config, partial(_load_dinov2, config.side))


def _load_clip(files: Files, device: torch.device, dtype: torch.dtype) -> Extract:
    # transformers takes seconds to import, and training measures pixels alone
    from fmg.rewards.clip import load_vision

    model, config = load_vision(files["model"], device, dtype)

    def extract(images: Float[Tensor, "b 3 h w"]) -> ImageFeatures:
        pixels = normalize(resize_and_crop(images, config.image_size), CLIP_MEAN, CLIP_STD)
        output = model(pixel_values=pixels.to(device, dtype), output_hidden_states=True)
        return ImageFeatures(F.normalize(output.image_embeds.float(), dim=-1), token_maps(output.hidden_states))

    return extract


def _load_dinov2(side: int, files: Files, device: torch.device, dtype: torch.dtype) -> Extract:
    from transformers import Dinov2Config as Dinov2Architecture
    from transformers import Dinov2Model

    from fmg.rewards.network import load_folder, load_pretrained

    folder = files["model"]
    config = load_pretrained(Dinov2Architecture.from_pretrained, folder.folder, "config")
    if side % config.patch_size:
        raise UsageError(
            f"The side of dinov2 is {side}, which is not a multiple of its patch size, {config.patch_size}",
            f"Set side to a multiple of {config.patch_size}.",
        )
    model = load_folder(Dinov2Model, folder.folder, "model", config, dtype).to(device)

    def extract(images: Float[Tensor, "b 3 h w"]) -> ImageFeatures:
        pixels = normalize(resize_and_crop(images, side), IMAGENET_MEAN, IMAGENET_STD)
        output = model(pixel_values=pixels.to(device, dtype), output_hidden_states=True)
        return ImageFeatures(output.pooler_output, token_maps(output.hidden_states))

    return extract


def token_maps(hidden_states: Sequence[Float[Tensor, "b tokens c"]]) -> Float[Tensor, "b m"]:
    """Patch tokens of `_LAYERS` evenly spaced layers, averaged to at most `_PLACES` x `_PLACES` positions.

    Args:
        hidden_states: states of the embeddings and of every layer; the first token is the class token.
    """
    last = len(hidden_states) - 1
    count = min(_LAYERS, last)
    layers = [_places(hidden_states[round(last * i / count)][:, 1:].float()) for i in range(1, count + 1)]
    joined: Tensor = torch.cat(layers, dim=1) / count**0.5
    return joined


def _places(tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b m"]:
    """Tokens on their grid with channels of unit length, scaled so that squared distances average over positions."""
    grid = int(tokens.shape[1] ** 0.5)
    picture = tokens.transpose(1, 2).reshape(len(tokens), -1, grid, grid)
    if grid > _PLACES:
        picture = F.adaptive_avg_pool2d(picture, _PLACES)
    scaled: Tensor = F.normalize(picture, dim=1).flatten(1) / min(grid, _PLACES)
    return scaled
