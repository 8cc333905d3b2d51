"""Options of SANA-Sprint. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fmg.core.hub import Asset, HubSource, parse_source
from fmg.core.specs import MAX_SIDE
from fmg.models.common.size import TransformerSize
from fmg.models.conventions import FlowMapConventions, SecondTime
from fmg.models.published import PublishedConfig, pipeline_folder
from fmg.models.sana.size import SPRINT_06B, SPRINT_16B, SanaSize
from fmg.registry.config import About

if TYPE_CHECKING:
    import torch

    from fmg.models.sana.model import SanaModel

COMPONENTS = ("vae", "text_encoder", "transformer")
_TERMS = "NSCL v2-custom (NVIDIA License, its LICENSE.txt); text encoder: Gemma Terms of Use"
_GEMMA_GB, _DCAE_GB = 5.2, 1.2
_SCALE = 32


class SanaSprintConfig(PublishedConfig):
    """SANA-Sprint in a diffusers pipeline folder: a single-time consistency model of 0.6 or 1.6 B parameters."""

    recipe: ClassVar[str | None] = "sana-sprint"
    transformer_class: ClassVar[str] = "SanaTransformer2DModel"
    size_class: ClassVar[type[TransformerSize]] = SanaSize
    # at 1024 px the activations weigh more than so small a transformer, and the autoencoder is not small beside it
    work_space: ClassVar[float] = 4.5
    about: ClassVar[About] = About(
        licence=f"{_TERMS}; as the model cards state them, not checked here",
        citation="Chen et al. 2025, SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation, "
        "arXiv 2503.09641",
        weights=(
            "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers: about 7.6 GB",
            "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers: about 9.6 GB",
        ),
    )

    in_diffusers: ClassVar[str] = "a `SanaSprintPipeline` of the base"
    exportable: ClassVar[bool] = True
    sampling_options: ClassVar[frozenset[str]] = frozenset({"guidance"})
    mergeable: ClassVar[bool] = False

    folder: str = Field(
        min_length=1, description="Pipeline folder: hub id owner/name@revision, or a local diffusers folder."
    )
    resolution: int = Field(
        default=1024, gt=0, le=MAX_SIDE, multiple_of=_SCALE, description="Side of the square image in pixels."
    )
    guidance: float = Field(default=4.5, ge=0, description="Embedded guidance scale.")
    max_sequence_length: int = Field(
        default=300, ge=2, le=512, description="Tokens of the prompt that the transformer sees."
    )
    instruction: bool = Field(
        default=True,
        description="Prepend the authors' instruction for the text encoder (enhance this prompt) to each prompt, as in "
        "their pipeline.",
    )

    def conventions(self) -> FlowMapConventions:
        """One time on the trig path, unscaled; two steps, at the angles of diffusers' SCMScheduler."""
        return FlowMapConventions(
            schema=1,
            map="single-time",
            path="trig",
            time_scale=1.0,
            second_time=SecondTime(takes="none"),
            resolution=self.resolution,
            max_sequence_length=self.max_sequence_length,
            default_steps=2,
            default_grid="scm-angle",
            guidance=self.guidance,
        )

    def architecture(self) -> Asset:
        size = 2 * SanaSize(self.published_config()).parameters / 1e9 + _GEMMA_GB + _DCAE_GB
        return pipeline_folder(self.folder, COMPONENTS, ("tokenizer",), size, _TERMS)

    def load(self, device: torch.device, dtype: torch.dtype) -> SanaModel:
        from fmg.models.sana.model import SanaModel

        return SanaModel.from_config(self, device, dtype)

    def published_config(self) -> Mapping[str, object]:
        """That of the size in the hub id."""
        source = parse_source(self.folder)
        name = source.repository if isinstance(source, HubSource) else ""
        return SPRINT_16B if "1.6b" in name.lower() else SPRINT_06B
