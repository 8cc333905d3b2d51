"""Options of the objectives. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fmg.registry.config import ObjectiveConfig


class GrpoConfig(ObjectiveConfig):
    """Flow-Map GRPO (arXiv 2607.00535): clipped policy ratio on transition densities."""

    clip_range: float = Field(
        default=1e-4, gt=0, lt=1, description="half-width of the ratio clip; log-probs are averaged over coordinates"
    )
    kl_beta: float = Field(default=0.0, ge=0, description="weight of the KL to the adapter-off reference; 0 skips it")

    @property
    def needs(self) -> Literal["transitions", "samples"]:
        """Transition densities."""
        return "transitions"


class RwfmConfig(ObjectiveConfig):
    """Reward-weighted flow matching (Fan et al., arXiv 2502.06061, online form) on finished samples."""

    temperature: float = Field(default=1.0, gt=0, description="weights are exp(advantage / temperature), mean 1")
    draws: int = Field(default=4, ge=1, description="noise levels drawn for each sample of a rollout")

    @property
    def needs(self) -> Literal["transitions", "samples"]:
        """Finished samples only."""
        return "samples"
