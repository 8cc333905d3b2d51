"""Options of FLUX.3 [klein]. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fmg.core.hub import Asset
from fmg.core.specs import MAX_SIDE, Kernel
from fmg.models.common.size import TransformerSize
from fmg.models.conventions import FlowMapConventions, SecondTime
from fmg.models.flux3.size import FLUX3, Flux3Size
from fmg.models.published import BYTES, PAPER_ANCHOR, DiffusersConfig, pipeline_folder
from fmg.registry.config import About

if TYPE_CHECKING:
    import torch

    from fmg.models.flux3.model import Flux3Model

COMPONENTS = ("vae", "text_encoder", "transformer")
_INDEX = "modular_model_index.json"
_VAE_GB = 0.2
_TOKEN, WINDOW = 16, 80


class Flux3KleinConfig(DiffusersConfig):
    """FLUX.3 [klein]: any folder of diffusers' `Flux3Transformer2DModel` with `flow_map`, a two-time flow map.

    One call gives the jump from t to any s: the network takes s directly, and a separate embedder adds it to the time
    embedding. All anchors can be used.

    We could not verify that weights of this class are public, or under which terms: the hub id is the one that
    diffusers' source code names, and the sizes in plans are the defaults of the class until a folder states others. A
    local folder with `transformer`, `vae`, `text_encoder` and `tokenizer` works as well.
    """

    recipe: ClassVar[str | None] = "flux3-klein"
    published: ClassVar[Mapping[str, object]] = FLUX3
    about: ClassVar[About] = About(
        licence="unknown: we could not verify that public weights exist",
        citation="Flux3Transformer2DModel in diffusers",
        weights=("black-forest-labs/flux-3-image-klein, as diffusers names it: about 20 GB by the sizes of the class",),
    )
    interior_kernel: ClassVar[Kernel | None] = PAPER_ANCHOR
    transformer_class: ClassVar[str] = "Flux3Transformer2DModel"
    size_class: ClassVar[type[TransformerSize]] = Flux3Size
    in_diffusers: ClassVar[str] = "a `Flux3DistilledModularPipeline` of the base"
    exportable: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False

    folder: str = Field(
        min_length=1, description="Pipeline folder: hub id owner/name@revision, or a local diffusers folder."
    )
    resolution: int = Field(
        default=1024, gt=0, le=MAX_SIDE, multiple_of=_TOKEN, description="Side of the square image in pixels."
    )
    max_sequence_length: int = Field(
        default=WINDOW,
        gt=0,
        le=480,
        multiple_of=WINDOW,
        description="Tokens that the chat around each prompt is padded to. The pipeline pads each prompt to the next "
        "multiple of 80, and the transformer sees the padding; here all prompts have one length.",
    )

    def conventions(self) -> FlowMapConventions:
        """Two times on the linear path, multiplied by 1000 inside the stock class; the target time is added."""
        return FlowMapConventions(
            schema=1,
            map="two-time",
            path="linear",
            time_scale=1000.0,
            second_time=SecondTime(takes="target"),
            resolution=self.resolution,
            max_sequence_length=self.max_sequence_length,
            default_steps=16,
            default_grid="shift-6.93",
        )

    def architecture(self) -> Asset:
        """The one folder, whose index is that of a modular pipeline."""
        size = BYTES * (Flux3Size(self.published).parameters + Flux3Size.encoder_parameters) / 1e9 + _VAE_GB
        asset = pipeline_folder(self.folder, COMPONENTS, ("tokenizer",), size, self.about.licence)
        return replace(asset, patterns=(_INDEX, *asset.patterns))

    def load(self, device: torch.device, dtype: torch.dtype) -> Flux3Model:
        from fmg.models.flux3.model import Flux3Model

        return Flux3Model.from_config(self, device, dtype)
