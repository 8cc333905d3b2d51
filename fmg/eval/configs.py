"""Options of the feature extractors. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fmg.core.hub import Asset
from fmg.registry.config import About, ComponentConfig
from fmg.rewards.configs import NetworkConfig
from fmg.rewards.published import CLIP_VIT_L_14, WEIGHT_FILES, clip_asset

DINOV2 = "facebook/dinov2-large"


class PixelsConfig(ComponentConfig):
    """The image itself, scaled down."""

    side: int = Field(default=8, ge=1, le=64, description="images are averaged to side x side pixels")


class ClipFeaturesConfig(NetworkConfig):
    """CLIP's image tower."""

    about: ClassVar[About] = About(
        licence="MIT (code); the model card calls the weights a research output",
        citation="Radford et al., CLIP, arXiv 2103.00020",
        weights=(f"{CLIP_VIT_L_14}: model.safetensors (1.7 GB)",),
    )

    weights: str = Field(default=CLIP_VIT_L_14, min_length=1, description="CLIPModel folder: local or hub id@revision")

    def assets(self) -> tuple[Asset, ...]:
        return (clip_asset(self.weights),)


class Dinov2Config(NetworkConfig):
    """DINOv2: features of a network trained without labels or captions, so that no reward is close to it."""

    about: ClassVar[About] = About(
        licence="Apache-2.0",
        citation="Oquab et al., DINOv2, arXiv 2304.07193; as a metric: Stein et al., arXiv 2306.04675",
        weights=(f"{DINOV2}: model.safetensors (1.2 GB)",),
    )

    weights: str = Field(default=DINOV2, min_length=1, description="Dinov2Model folder: local or hub id@revision")
    side: int = Field(default=224, ge=14, description="images become squares of this side, a multiple of the patch")

    def assets(self) -> tuple[Asset, ...]:
        files = (WEIGHT_FILES, "config.json")
        return (Asset("model", "weights", self.weights, files, size_gb=1.2, licence="Apache-2.0"),)
