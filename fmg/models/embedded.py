"""Options of the models. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fmg.core.files import from_home
from fmg.core.specs import MapSpec, ModelGeometry
from fmg.models.conventions import FLUX_IN_DIFFUSERS, read_conventions
from fmg.models.flux.size import flux_geometry
from fmg.registry.config import About, ModelConfig

if TYPE_CHECKING:
    import torch

    from fmg.models.flux.model import FluxModel

# In branched runs anchors of .5 s to .7 s learned fastest, .7 s most steadily (docs/branching.md).
_ANCHOR = ("asfmc", (("ratio", 0.7),))


class EmbeddedConfig(ModelConfig):
    """Options of a model whose weights ship with the package."""

    asset: ClassVar[str]
    """Name of the model, of its folder under the package's assets, and of its recipe."""

    about: ClassVar[About] = About(
        licence="Apache-2.0", weights=("in the package; `fmg pretrain shapes` retrains them",)
    )

    in_diffusers: ClassVar[str] = FLUX_IN_DIFFUSERS
    flow_map_pipeline: ClassVar[bool] = True
    exportable: ClassVar[bool] = True

    folder: str | None = Field(
        default=None,
        description="Model folder to load instead of the weights that ship with the package.",
    )

    def directory(self) -> Path:
        if self.folder is not None:
            return from_home(self.folder)
        return Path(str(files("fmg").joinpath("assets", self.asset)))

    def spec(self) -> MapSpec:
        """Declared properties, read from the JSON beside the weights.

        Raises:
            CheckpointError: the folder is missing or is not a flow-map model.
        """
        spec = read_conventions(self.directory()).spec(self.asset)
        return replace(spec, default_stochasticizer=_ANCHOR) if spec.anchors == "any" else spec

    def card_facts(self) -> Mapping[str, str]:
        """Terms of the weights in the package; those of a different folder are unknown."""
        return {"license": "apache-2.0"} if self.folder is None else {}

    def geometry(self) -> ModelGeometry:
        """Sizes from the JSON files and safetensors headers of the folder."""
        return flux_geometry(self.directory(), read_conventions(self.directory()))


class MeanFlowShapesConfig(EmbeddedConfig):
    """The embedded two-time map (MeanFlow) of the shapes world."""

    asset: ClassVar[str] = "meanflow-shapes"


class ScmShapesConfig(EmbeddedConfig):
    """The embedded single-time map (consistency model) of the shapes world."""

    asset: ClassVar[str] = "scm-shapes"


class MeanFlowTextConfig(EmbeddedConfig):
    """The embedded two-time map (MeanFlow) of the text world."""

    asset: ClassVar[str] = "meanflow-text"
    about: ClassVar[About] = About(licence="Apache-2.0", weights=("in the package; `fmg pretrain text` retrains them",))


@dataclass(frozen=True)
class EmbeddedSource:
    """An embedded model that has not been loaded yet."""

    config: EmbeddedConfig

    @property
    def spec(self) -> MapSpec:
        """Declared properties, known without reading a weight."""
        return self.config.spec()

    def check(self) -> None:
        """Checks that the folder exists.

        Raises:
            CheckpointError: it is missing or is not a flow-map model.
        """
        self.config.spec()

    def load(self, device: torch.device, dtype: torch.dtype) -> FluxModel:
        """Loads the weights to `device` in `dtype`.

        Raises:
            CheckpointError: a file of the folder is missing, damaged or of the wrong kind.
        """
        # diffusers and transformers take seconds to import, and composing a run needs neither
        from fmg.models.flux.model import FluxModel

        return FluxModel.from_folder(self.config.directory(), device, dtype, name=self.config.asset)
