"""The embedded models: diffusers folders of a few megabytes, loaded by the code that loads full-size FLUX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmg.core.specs import MapSpec
from fmg.models.configs import EmbeddedConfig, MeanFlowShapesConfig, MeanFlowTextConfig, ScmShapesConfig
from fmg.registry import models

if TYPE_CHECKING:
    import torch

    from fmg.models.flux.model import FluxModel


@dataclass(frozen=True)
class EmbeddedSource:
    """An embedded model that has not been loaded yet."""

    config: EmbeddedConfig

    @property
    def spec(self) -> MapSpec:
        """Declared properties, known without reading a weight."""
        return self.config.spec()

    def check(self) -> None:
        """Looks whether the folder is there.

        Raises:
            CheckpointError: it is missing or is not a flow-map model.
        """
        self.config.spec()

    def load(self, device: torch.device, dtype: torch.dtype) -> FluxModel:
        """Reads the weights to `device` in `dtype`.

        Raises:
            CheckpointError: a file of the folder is missing, damaged or of another kind.
        """
        # diffusers and transformers take seconds to import, and composing a run does not need them
        from fmg.models.flux.model import FluxModel

        return FluxModel.from_folder(self.config.directory(), device, dtype, name=self.config.asset)


@models.register("meanflow-shapes", MeanFlowShapesConfig)
def meanflow_shapes(config: MeanFlowShapesConfig) -> EmbeddedSource:
    """The embedded two-time flow map that draws coloured shapes."""
    return EmbeddedSource(config)


@models.register("scm-shapes", ScmShapesConfig)
def scm_shapes(config: ScmShapesConfig) -> EmbeddedSource:
    """The embedded single-time consistency model that draws coloured shapes."""
    return EmbeddedSource(config)


@models.register("meanflow-text", MeanFlowTextConfig)
def meanflow_text(config: MeanFlowTextConfig) -> EmbeddedSource:
    """The embedded two-time flow map that writes three letters on a sign."""
    return EmbeddedSource(config)
