"""The FLUX-class models of full size: a student's published weights in its teacher's pipeline."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmg.core.errors import FmgWarning
from fmg.core.specs import MapSpec
from fmg.models.flux_configs import FluxConfig, FluxFewStepConfig, MeanFlowFluxConfig, ScmFluxConfig
from fmg.models.sources import locate
from fmg.registry import models

if TYPE_CHECKING:
    import torch

    from fmg.models.flux.family import FluxModel


@dataclass(frozen=True)
class FluxSource:
    """A FLUX-class model that has not been loaded yet."""

    name: str
    config: FluxConfig

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

    def load(self, device: torch.device, dtype: torch.dtype) -> FluxModel:
        """Reads the weights to `device` in `dtype`; warns when they do not fit the stated time scale.

        Raises:
            MissingDependencyError: files that have not been fetched, or an attention backend that is not installed.
            CheckpointError: a file that is damaged, of another kind, or does not fit the others.
        """
        self.check()
        # diffusers and transformers take seconds to import, and composing a run does not need them
        from fmg.models.flux.full_size import load

        if device.type == "cpu" and self.spec.gpu_memory_gb:
            warnings.warn(f"'{self.name}' runs on the CPU, which takes minutes an image.", FmgWarning, stacklevel=2)
        return load(self.name, self.config, device, dtype)


@models.register("meanflow-flux", MeanFlowFluxConfig)
def meanflow_flux(config: MeanFlowFluxConfig) -> FluxSource:
    """The two-time MeanFlow student of FLUX.1-lite-8B."""
    return FluxSource("meanflow-flux", config)


@models.register("scm-flux", ScmFluxConfig)
def scm_flux(config: ScmFluxConfig) -> FluxSource:
    """The single-time sCM student of FLUX.1-lite-8B."""
    return FluxSource("scm-flux", config)


@models.register("flux-fewstep", FluxFewStepConfig)
def flux_fewstep(config: FluxFewStepConfig) -> FluxSource:
    """A few-step FLUX-class flow map in a diffusers folder."""
    return FluxSource("flux-fewstep", config)
