"""The models whose weights somebody published: looked for on this computer, never on the network."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmg.core.errors import FmgWarning
from fmg.core.specs import MapSpec
from fmg.models.flux_configs import FluxFewStepConfig, MeanFlowFluxConfig, ScmFluxConfig
from fmg.models.published import PublishedConfig
from fmg.models.sana_configs import SanaSprintConfig
from fmg.models.sources import locate
from fmg.registry import models

if TYPE_CHECKING:
    import torch

    from fmg.core.protocols import Model

FLUX, SANA = "fmg.models.flux.full_size", "fmg.models.sana.full_size"


@dataclass(frozen=True)
class PublishedSource:
    """A model that has not been loaded yet.

    Attributes:
        name: registered name of the model.
        config: its options.
        loader: module whose `load(name, config, device, dtype)` reads it.
    """

    name: str
    config: PublishedConfig
    loader: str = FLUX

    @property
    def spec(self) -> MapSpec:
        """Declared properties, known without reading a weight."""
        return self.config.spec()

    def check(self) -> None:
        """Looks whether every file is on this computer, without reading a weight.

        Raises:
            MissingDependencyError: published files that have not been fetched; names the command that does.
            CheckpointError: a local source that does not exist or is not complete.
        """
        for part in self.config.parts():
            locate(part, self.name)

    def load(self, device: torch.device, dtype: torch.dtype) -> Model:
        """Reads the weights to `device` in `dtype`; warns when they do not fit the stated time scale.

        Raises:
            MissingDependencyError: files that have not been fetched, or an attention backend that is not installed.
            CheckpointError: a file that is damaged, of another kind, or does not fit the others.
        """
        self.check()
        # diffusers and transformers take seconds to import, and composing a run does not need them

        if device.type == "cpu" and self.spec.gpu_memory_gb:
            warnings.warn(f"'{self.name}' runs on the CPU, which takes minutes an image.", FmgWarning, stacklevel=2)
        model: Model = importlib.import_module(self.loader).load(self.name, self.config, device, dtype)
        return model


@models.register("meanflow-flux", MeanFlowFluxConfig)
def meanflow_flux(config: MeanFlowFluxConfig) -> PublishedSource:
    """The two-time MeanFlow student of FLUX.1-lite-8B."""
    return PublishedSource("meanflow-flux", config)


@models.register("scm-flux", ScmFluxConfig)
def scm_flux(config: ScmFluxConfig) -> PublishedSource:
    """The single-time sCM student of FLUX.1-lite-8B."""
    return PublishedSource("scm-flux", config)


@models.register("flux-fewstep", FluxFewStepConfig)
def flux_fewstep(config: FluxFewStepConfig) -> PublishedSource:
    """A few-step FLUX-class flow map in a diffusers folder."""
    return PublishedSource("flux-fewstep", config)


@models.register("sana-sprint", SanaSprintConfig)
def sana_sprint(config: SanaSprintConfig) -> PublishedSource:
    """The single-time SANA-Sprint model."""
    return PublishedSource("sana-sprint", config, SANA)
