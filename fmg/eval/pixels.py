"""The feature extractor of the embedded worlds: the picture itself, scaled down."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fmg.core.types import ImageFeatures
from fmg.eval.configs import PixelsConfig
from fmg.registry import feature_extractors
from fmg.rewards.images import check_drawable


@feature_extractors.register("pixels", PixelsConfig)
class Pixels:
    """Pixels averaged to `side` x `side`. The distance of maps is the mean squared difference over pixels and channels.

    Vectors are the same numbers around grey, so that their cosine distance is that of contrasts.
    """

    def __init__(self, config: PixelsConfig) -> None:
        self._side = config.side

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> ImageFeatures:
        """Features of images in [0, 1]."""
        check_drawable(images)
        flat = F.adaptive_avg_pool2d(images.detach().float().cpu(), self._side).flatten(1)
        return ImageFeatures(vectors=flat - 0.5, maps=flat / flat.shape[1] ** 0.5)
