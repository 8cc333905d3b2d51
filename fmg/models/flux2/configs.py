"""Options of FLUX.2 [klein]. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fmg.core.hub import Asset, HubSource, parse_source
from fmg.core.specs import MAX_SIDE, Kernel
from fmg.models.common.size import TransformerSize
from fmg.models.conventions import FlowMapConventions, SecondTime
from fmg.models.flux2.size import KLEIN_4B, KLEIN_9B, Flux2Size
from fmg.models.published import BYTES, EULER_ANCHORS, EULER_KERNEL, DiffusersConfig, pipeline_folder
from fmg.registry.config import About

if TYPE_CHECKING:
    import torch

    from fmg.models.flux2.model import Flux2Model

COMPONENTS = ("vae", "text_encoder", "transformer")
_TERMS_4B, _TERMS_9B = "Apache-2.0", "FLUX Non-Commercial License"
_VAE_GB = 0.2
_TOKEN = 16


class Flux2KleinConfig(DiffusersConfig):
    """FLUX.2 [klein] in a diffusers pipeline folder: 4 or 9 B parameters, four Euler steps without CFG."""

    recipe: ClassVar[str | None] = "flux2-klein"
    anchor_note: ClassVar[str] = EULER_ANCHORS
    about: ClassVar[About] = About(
        licence=f"4B: {_TERMS_4B}; 9B: {_TERMS_9B}; as the model cards state them, not checked here",
        citation="Black Forest Labs 2026, FLUX.2 [klein], https://bfl.ai/blog/flux2-klein-towards-interactive-visual-"
        "intelligence",
        weights=(
            "black-forest-labs/FLUX.2-klein-4B: about 16 GB",
            "black-forest-labs/FLUX.2-klein-9B: about 35 GB, after its terms are accepted on the hub",
        ),
    )
    interior_kernel: ClassVar[Kernel | None] = EULER_KERNEL
    transformer_class: ClassVar[str] = "Flux2Transformer2DModel"
    size_class: ClassVar[type[TransformerSize]] = Flux2Size
    in_diffusers: ClassVar[str] = "a `Flux2KleinPipeline` of the base"
    exportable: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False

    folder: str = Field(
        min_length=1,
        description="Pipeline folder: hub id owner/name@revision, or a local diffusers folder. A hub id with 9B means "
        "the larger model.",
    )
    resolution: int = Field(
        default=1024, gt=0, le=MAX_SIDE, multiple_of=_TOKEN, description="Side of the square image in pixels."
    )
    max_sequence_length: int = Field(
        default=512,
        ge=16,
        le=512,
        description="Tokens of the prompt with its chat template. The transformer sees the padding, so other values "
        "than 512 give other images.",
    )

    def conventions(self) -> FlowMapConventions:
        """A velocity on the linear path, its times multiplied by 1000 inside the stock class; four steps."""
        return FlowMapConventions(
            schema=1,
            map="velocity",
            path="linear",
            time_scale=1000.0,
            second_time=SecondTime(takes="none"),
            resolution=self.resolution,
            max_sequence_length=self.max_sequence_length,
            default_steps=4,
            default_grid="flux2-shift",
        )

    def architecture(self) -> Asset:
        size = Flux2Size(self.published_config())
        size_gb = BYTES * (size.parameters + size.encoder_parameters) / 1e9 + _VAE_GB
        terms = _TERMS_9B if self._is_9b() else _TERMS_4B
        return pipeline_folder(self.folder, COMPONENTS, ("tokenizer",), size_gb, terms)

    def card_facts(self) -> Mapping[str, str]:
        """The repository of the base and its licence, which has an identifier on the hub only for 4B."""
        facts = super().card_facts()
        known = facts and not self._is_9b() and "klein-4b" in facts["base_model"].lower()
        return {"base_model": facts["base_model"], "license": "apache-2.0"} if known else facts

    def load(self, device: torch.device, dtype: torch.dtype) -> Flux2Model:
        from fmg.models.flux2.model import Flux2Model

        return Flux2Model.from_config(self, device, dtype)

    def published_config(self) -> Mapping[str, object]:
        """That of the size in the hub id."""
        return KLEIN_9B if self._is_9b() else KLEIN_4B

    def _is_9b(self) -> bool:
        source = parse_source(self.folder)
        return isinstance(source, HubSource) and "9b" in source.repository.lower()
