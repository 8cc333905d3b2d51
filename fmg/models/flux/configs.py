"""Options of the FLUX-class models of full size. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from fmg.core.hub import Asset
from fmg.core.specs import MAX_SIDE, Kernel, MapKind, ModelGeometry
from fmg.models.conventions import FLUX_IN_DIFFUSERS, FlowMapConventions, SecondTime, check_second_time
from fmg.models.flux.size import FLUX_LITE, FLUX_SCHNELL, SECOND_EMBEDDER, flux_geometry, transformer_parameters
from fmg.models.published import BYTES, PAPER_ANCHOR, DiffusersConfig, StackedConfig, pipeline_folder
from fmg.registry.config import About

if TYPE_CHECKING:
    import torch

    from fmg.models.flux.model import FluxModel

COMPONENTS = ("vae", "text_encoder", "text_encoder_2")
"""What a student borrows from its teacher's folder, besides tokenizers and the transformer's `config.json`."""

_CONFIG_FILES = ("model_index.json", "transformer/*.json", "tokenizer/*", "tokenizer_2/*")
_COMPONENT_FILES = tuple(f"{name}/{files}" for name in COMPONENTS for files in ("*.json", "*.safetensors"))

PIPELINE_FILES = (*_CONFIG_FILES, *_COMPONENT_FILES, "transformer/*.safetensors")
"""Files of a whole pipeline folder, as patterns."""

_FLUX_DEV_TERMS = "FLUX.1 [dev] Non-Commercial License"
_T2I_DISTILL = "Pu et al. 2025, Few-Step Distillation for Text-to-Image Generation, arXiv 2512.13006"
_TEACHER = "Freepik/flux.1-lite-8B: T5, CLIP and VAE, about 9.9 GB"


class FluxConfig(DiffusersConfig):
    """Options of every FLUX-class model of full size."""

    interior_kernel: ClassVar[Kernel | None] = PAPER_ANCHOR
    transformer_class: ClassVar[str] = "FluxTransformer2DModel"
    published: ClassVar[Mapping[str, object]] = FLUX_LITE

    in_diffusers: ClassVar[str] = FLUX_IN_DIFFUSERS
    flow_map_pipeline: ClassVar[bool] = True
    exportable: ClassVar[bool] = True

    time_scale: float = Field(
        gt=0,
        description="Factor on times and guidance before their sinusoids: 1 for the published students, 1000 for stock "
        "FLUX weights. With the wrong one the model generates noise, without an error.",
    )
    resolution: int = Field(
        default=512, gt=0, le=MAX_SIDE, multiple_of=16, description="Side of the square image in pixels."
    )
    guidance: float | None = Field(
        default=3.5, ge=0, description="Embedded guidance scale; null for weights that embed none."
    )
    max_sequence_length: int = Field(
        default=256, gt=0, le=512, description="Length to which T5 tokens are padded or truncated."
    )

    def parameters(self) -> int:
        """Parameters of the transformer, by its `config.json` in a local folder, else by the published one."""
        return transformer_parameters(self.transformer(), second_time=bool(self.conventions().second_time))

    def load(self, device: torch.device, dtype: torch.dtype) -> FluxModel:
        from fmg.models.flux.model import FluxModel

        return FluxModel.from_config(self, device, dtype)

    def sizes(self) -> ModelGeometry:
        return flux_geometry(self.folder_here(), self.conventions(), published=self.published)


class FluxStudentConfig(FluxConfig):
    """A distilled student whose file has only the transformer; everything else comes from its teacher's folder."""

    student: str = Field(
        min_length=1,
        description="Weights of the transformer: hub file owner/name@revision:file, or a local .pt, .safetensors or "
        "diffusers component folder.",
    )
    teacher: str = Field(
        min_length=1, description="Folder of the teacher's pipeline: hub id owner/name@revision, or a local folder."
    )

    def assets(self) -> tuple[Asset, ...]:
        """The student's weights, and what it borrows from its teacher."""
        return (
            Asset(
                "student",
                "model.student",
                self.student,
                patterns=("*.safetensors", "*.json"),
                size_gb=BYTES * transformer_parameters(FLUX_LITE, second_time=True) / 1e9,
                licence="not stated by its authors; derived from FLUX.1 [dev]",
            ),
            self.architecture(),
        )

    def architecture(self) -> Asset:
        return Asset(
            "teacher",
            "model.teacher",
            self.teacher,
            folders=COMPONENTS,
            patterns=(*_CONFIG_FILES, *_COMPONENT_FILES),
            size_gb=9.9,
            licence=_FLUX_DEV_TERMS,
        )


class MeanFlowFluxConfig(FluxStudentConfig):
    """The two-time student (MeanFlow) of FLUX.1-lite-8B that T2I-Distill published."""

    recipe: ClassVar[str | None] = "meanflow-flux"
    about: ClassVar[About] = About(
        licence=f"student: not stated by its authors; teacher: {_FLUX_DEV_TERMS}",
        citation=_T2I_DISTILL,
        weights=("Alibaba-DAMO-Academy/T2I-Distill: student, about 16.3 GB", _TEACHER),
    )

    def conventions(self) -> FlowMapConventions:
        """Two times, the second as the duration; five steps of the Flow-Map GRPO paper."""
        return _conventions(self, "two-time", SecondTime(takes="duration"), steps=5, grid="paper")


class ScmFluxConfig(FluxStudentConfig):
    """The single-time student (sCM) of FLUX.1-lite-8B that T2I-Distill published."""

    recipe: ClassVar[str | None] = "scm-flux"
    about: ClassVar[About] = MeanFlowFluxConfig.about

    def conventions(self) -> FlowMapConventions:
        """One time; the TrigFlow wrapper of its authors cancels to `x - t net(x, t)` on the linear path."""
        return _conventions(self, "single-time", SecondTime(takes="none"), steps=2, grid="scm")


class FluxFewStepConfig(StackedConfig, FluxConfig):
    """Any few-step FLUX-class flow map in a diffusers pipeline folder, sampled by the conventions stated here."""

    recipe: ClassVar[str | None] = "flux-fewstep"
    published: ClassVar[Mapping[str, object]] = FLUX_SCHNELL
    second_embedder: ClassVar[str] = SECOND_EMBEDDER
    about: ClassVar[About] = About(
        licence="by default FLUX.1 [schnell], Apache-2.0",
        citation="Sauer et al. 2024, Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion "
        "Distillation, arXiv 2403.12015",
        weights=("black-forest-labs/FLUX.1-schnell: about 33.7 GB",),
    )

    folder: str = Field(
        min_length=1, description="Pipeline folder: hub id owner/name@revision, or a local diffusers folder."
    )
    map: MapKind = Field(
        description="Whether the network takes a second time, only jumps to 0, or predicts a velocity that is sampled "
        "by Euler steps."
    )
    second_time: SecondTime = Field(
        description="How the second time enters: duration, target or none, or {takes, gate, scale} if its embedding "
        "is not simply added."
    )
    path: Literal["linear"] = Field(
        default="linear",
        description="Path of the latents; a TrigFlow student of FLUX is linear in these coordinates, see docs/math.md.",
    )
    default_steps: int = Field(default=4, ge=1, description="Sampling steps (NFE) that the map was distilled for.")
    default_grid: str = Field(default="uniform", description="Name of the time grid that it was distilled for.")

    @model_validator(mode="after")
    def _times_fit(self) -> FluxFewStepConfig:
        check_second_time(self.map, self.second_time)
        return self

    def conventions(self) -> FlowMapConventions:
        return _conventions(self, self.map, self.second_time, steps=self.default_steps, grid=self.default_grid)

    def architecture(self) -> Asset:
        parts = (*COMPONENTS, "transformer")
        return pipeline_folder(self.folder, parts, ("tokenizer", "tokenizer_2"), 33.7, "Apache-2.0")


def _conventions(
    config: FluxConfig,
    kind: MapKind,
    second: SecondTime,
    *,
    steps: int,
    grid: str,
) -> FlowMapConventions:
    return FlowMapConventions(
        schema=1,
        map=kind,
        path="linear",
        time_scale=config.time_scale,
        second_time=second,
        resolution=config.resolution,
        max_sequence_length=config.max_sequence_length,
        default_steps=steps,
        default_grid=grid,
        guidance=config.guidance,
    )
