"""Options of SD3.5-Medium as a flow map. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from fmg.core.hub import Asset
from fmg.core.specs import MAX_SIDE, Kernel
from fmg.models.common.size import TransformerSize
from fmg.models.conventions import FlowMapConventions, SecondTime, check_second_time
from fmg.models.published import PAPER_ANCHOR, DiffusersConfig, StackedConfig, pipeline_folder
from fmg.models.sd3.size import SD35_MEDIUM, SECOND_EMBEDDER, SD3Size
from fmg.registry.config import About

if TYPE_CHECKING:
    import torch

    from fmg.models.sd3.model import SD3Model

COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer")
_TERMS = "Stability AI Community License"
_SCALE = 16


class SD35MeanFlowConfig(StackedConfig, DiffusersConfig):
    """SD3.5-Medium with the second-time embedder of AnyFlow and the adapters of MeanFlowNFT: a two-time map."""

    recipe: ClassVar[str | None] = "sd35-meanflow"
    interior_kernel: ClassVar[Kernel | None] = PAPER_ANCHOR
    transformer_class: ClassVar[str] = "SD3Transformer2DModel"
    size_class: ClassVar[type[TransformerSize]] = SD3Size
    published: ClassVar[Mapping[str, object]] = SD35_MEDIUM
    second_embedder: ClassVar[str] = SECOND_EMBEDDER
    # beside so small a transformer, activations and the table of positions weigh more
    work_space: ClassVar[float] = 2.0
    about: ClassVar[About] = About(
        licence=f"base: {_TERMS}; adapters: as their authors state",
        citation="Huang et al. 2026, MeanFlowNFT: Bringing Forward-Process RL to Average-Velocity Generators, "
        "arXiv 2607.15273",
        weights=(
            "stabilityai/stable-diffusion-3.5-medium: about 16.3 GB, after its terms are accepted on the hub",
            "Harahan/MeanFlowNFT: AnyFlow's pretraining, on-policy and NFT adapters; name them in model.adapters",
        ),
    )
    in_diffusers: ClassVar[str] = "a `StableDiffusion3Pipeline` of the merged base"
    exportable: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False

    folder: str = Field(
        min_length=1, description="Pipeline folder: hub id owner/name@revision, or a local diffusers folder."
    )
    second_time: SecondTime = Field(
        description="How the second time enters: {takes, gate, scale}, or duration or target where it is added."
    )
    resolution: int = Field(
        default=512, gt=0, le=MAX_SIDE, multiple_of=_SCALE, description="Side of the square image in pixels."
    )
    max_sequence_length: int = Field(
        default=128, gt=0, le=512, description="Length to which T5 tokens are padded or truncated; both CLIPs have 77."
    )

    @model_validator(mode="after")
    def _has_two_times(self) -> SD35MeanFlowConfig:
        check_second_time("two-time", self.second_time)
        return self

    def conventions(self) -> FlowMapConventions:
        """Two times, scaled by 1000; four equal steps under SD3.5's shift of 3."""
        return FlowMapConventions(
            schema=1,
            map="two-time",
            path="linear",
            time_scale=1000.0,
            second_time=self.second_time,
            resolution=self.resolution,
            max_sequence_length=self.max_sequence_length,
            default_steps=4,
            default_grid="shift-3",
        )

    def architecture(self) -> Asset:
        tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
        return pipeline_folder(self.folder, COMPONENTS, tokenizers, 16.3, _TERMS)

    def load(self, device: torch.device, dtype: torch.dtype) -> SD3Model:
        from fmg.models.sd3.model import SD3Model

        return SD3Model.from_config(self, device, dtype)
