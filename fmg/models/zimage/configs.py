"""Options of Z-Image-Turbo. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fmg.core.hub import Asset
from fmg.core.specs import MAX_SIDE, Kernel
from fmg.models.common.size import TransformerSize
from fmg.models.conventions import FlowMapConventions, SecondTime
from fmg.models.published import BYTES, EULER_ANCHORS, EULER_KERNEL, DiffusersConfig, pipeline_folder
from fmg.models.zimage.size import Z_IMAGE, ZImageSize
from fmg.registry.config import About

if TYPE_CHECKING:
    import torch

    from fmg.models.zimage.model import ZImageModel

COMPONENTS = ("vae", "text_encoder", "transformer")
_TERMS = "Apache-2.0"
_QWEN_GB, _VAE_GB = 8.0, 0.2
_SCALE = 16


class ZImageTurboConfig(DiffusersConfig):
    """Z-Image-Turbo in a diffusers pipeline folder: 6 B parameters, distilled for eight Euler steps without CFG."""

    recipe: ClassVar[str | None] = "z-image-turbo"
    interior_kernel: ClassVar[Kernel | None] = EULER_KERNEL
    transformer_class: ClassVar[str] = "ZImageTransformer2DModel"
    size_class: ClassVar[type[TransformerSize]] = ZImageSize
    published: ClassVar[Mapping[str, object]] = Z_IMAGE
    about: ClassVar[About] = About(
        licence=f"{_TERMS}; as the model card states it, not checked here",
        citation="Z-Image Team 2025, Z-Image: An Efficient Image Generation Foundation Model with Single-Stream "
        "Diffusion Transformer, arXiv 2511.22699",
        weights=("Tongyi-MAI/Z-Image-Turbo: about 20.5 GB",),
    )
    in_diffusers: ClassVar[str] = "a `ZImagePipeline` of the base"
    constant_shapes: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    anchor_note: ClassVar[str] = EULER_ANCHORS

    folder: str = Field(
        min_length=1, description="Pipeline folder: hub id owner/name@revision, or a local diffusers folder."
    )
    resolution: int = Field(
        default=1024, gt=0, le=MAX_SIDE, multiple_of=_SCALE, description="Side of the square image in pixels."
    )
    max_sequence_length: int = Field(
        default=512, ge=32, le=512, multiple_of=32, description="Tokens of the prompt with its chat template, at most."
    )

    def conventions(self) -> FlowMapConventions:
        """A velocity on the linear path; eight steps of the uniform grid with a shift of 3."""
        return FlowMapConventions(
            schema=1,
            map="velocity",
            path="linear",
            time_scale=1000.0,
            second_time=SecondTime(takes="none"),
            resolution=self.resolution,
            max_sequence_length=self.max_sequence_length,
            default_steps=8,
            default_grid="shift-3",
        )

    def architecture(self) -> Asset:
        size = BYTES * ZImageSize(self.published).parameters / 1e9 + _QWEN_GB + _VAE_GB
        return pipeline_folder(self.folder, COMPONENTS, ("tokenizer",), size, _TERMS)

    def load(self, device: torch.device, dtype: torch.dtype) -> ZImageModel:
        from fmg.models.zimage.model import ZImageModel

        return ZImageModel.from_config(self, device, dtype)
