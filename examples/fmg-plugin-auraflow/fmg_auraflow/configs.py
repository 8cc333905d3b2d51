"""Options of AuraFlow, and the five facts that no file of its weights states. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fmg.core.hub import Asset
from fmg.core.specs import MAX_SIDE
from fmg.models.conventions import FlowMapConventions, SecondTime
from fmg.models.published import DiffusersConfig, pipeline_folder
from fmg.registry.config import About

if TYPE_CHECKING:
    import torch

    from fmg_auraflow.model import AuraFlowModel

PARAMETERS = 6_800_000_000


class AuraFlowConfig(DiffusersConfig):
    """A few-step student of AuraFlow in a diffusers pipeline folder: a velocity network, sampled by Euler steps."""

    recipe: ClassVar[str | None] = str(Path(__file__).with_name("auraflow.yaml"))
    # 1. the class
    transformer_class: ClassVar[str] = "AuraFlowTransformer2DModel"
    published: ClassVar[Mapping[str, object]] = {}
    about: ClassVar[About] = About(licence="Apache-2.0", weights=("fal/AuraFlow-v0.3: about 16.5 GB",))
    in_diffusers: ClassVar[str] = "an `AuraFlowPipeline` of the base"
    exportable: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False

    folder: str = Field(
        min_length=1, description="Pipeline folder: hub id owner/name@revision, or a local diffusers folder."
    )
    resolution: int = Field(default=1024, gt=0, le=MAX_SIDE, description="Side of the square image in pixels.")
    max_sequence_length: int = Field(default=256, gt=0, le=512, description="Tokens of the prompt.")
    default_steps: int = Field(default=4, ge=1, description="Sampling steps (NFE) that the student was distilled for.")

    def conventions(self) -> FlowMapConventions:
        """A velocity on the linear path."""
        return FlowMapConventions(
            schema=1,
            map="velocity",
            path="linear",
            # 2. and 3. how a second time joins the first, and what it takes: there is none
            second_time=SecondTime(takes="none"),
            # 4. the scale of times
            time_scale=1000.0,
            # 5. the grid
            default_grid="uniform",
            default_steps=self.default_steps,
            resolution=self.resolution,
            max_sequence_length=self.max_sequence_length,
        )

    def architecture(self) -> Asset:
        """The one folder."""
        components = ("vae", "text_encoder", "transformer")
        return pipeline_folder(self.folder, components, ("tokenizer",), 16.5, "Apache-2.0")

    def load(self, device: torch.device, dtype: torch.dtype) -> AuraFlowModel:
        """As `PublishedConfig.load`."""
        from fmg_auraflow.model import AuraFlowModel

        return AuraFlowModel.from_config(self, device, dtype)

    def parameters(self) -> int:
        """Parameters of the published transformer; of a local folder, those in the headers of its files."""
        # not needed elsewhere, so that listing components stays fast
        from fmg.models.common.size import stored_parameters

        return stored_parameters(self.folder_here(), "transformer") or PARAMETERS
