"""Options of the stochasticizers, and what each requires of a map. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from pydantic import Field, model_validator

from fmg.core.specs import Requirements
from fmg.registry.config import StochasticizerConfig

AnchorRule = Literal["gap", "ratio", "noise_share", "hold"]

DEFAULT_ANCHOR: tuple[AnchorRule, float] = ("ratio", 0.9)
"""The anchor rule of `asfmc` when no option is given."""

# with an anchor closer to the target the std is so small that fp32 log-probabilities lose their digits
_LEAST_GAP, LARGEST_SHARE = 1e-4, 0.9999
_LEAST_NOISE, _LARGEST_NOISE = 1e-3, 10.0


class AsfmcConfig(StochasticizerConfig):
    """Anchored stochastic flow map composition, exact form. At most one of the four options may be given."""

    exclusive: ClassVar[frozenset[str]] = frozenset(get_args(AnchorRule))

    gap: float | None = Field(
        None,
        ge=_LEAST_GAP,
        le=1,
        description="Anchor a = max(0, s - gap); 0.0147 is the regime of the Flow-Map GRPO paper.",
    )
    ratio: float | None = Field(
        None,
        ge=0,
        le=LARGEST_SHARE,
        description=f"Anchor a = ratio * s. With no option at all, {DEFAULT_ANCHOR[0]} = {DEFAULT_ANCHOR[1]}.",
    )
    noise_share: float | None = Field(
        None,
        ge=0,
        le=LARGEST_SHARE,
        description="Anchor whose noise-to-signal ratio is this fraction m of the one at s.",
    )

    hold: float | None = Field(
        None,
        ge=0.01,
        le=100,
        description="Noise share m = (rho(s) / rho(t))^(hold^2): the noise follows the length of the step. 1 is the"
        " standard SDE of the flow, large values the endpoint anchor.",
    )

    @model_validator(mode="after")
    def _one_rule(self) -> AsfmcConfig:
        given = [name for name in get_args(AnchorRule) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give only one of gap, ratio, noise_share and hold, not {' and '.join(given)}")
        return self

    @property
    def anchor(self) -> tuple[AnchorRule, float]:
        """The active rule and its value."""
        if self.gap is not None:
            return "gap", self.gap
        if self.ratio is not None:
            return "ratio", self.ratio
        if self.noise_share is not None:
            return "noise_share", self.noise_share
        if self.hold is not None:
            return "hold", self.hold
        return DEFAULT_ANCHOR

    def requires(self) -> Requirements:
        return Requirements(anchors="any", path="any", calls=1, min_target_time=0.0)


class AsfmcEndpointConfig(StochasticizerConfig):
    """Anchor at the clean endpoint."""

    noise_level: float = Field(
        1.0, ge=_LEAST_NOISE, le=1, description="Multiplies the std; the probability path is preserved only at 1."
    )

    def requires(self) -> Requirements:
        return Requirements(anchors="endpoint", path="any", calls=1, min_target_time=0.0)


class AsfmcEulerConfig(StochasticizerConfig):
    """The local anchor of the Flow-Map GRPO paper in first-order form."""

    epsilon: float = Field(
        0.03, ge=_LEAST_GAP, lt=1, description="Distance of the local anchor; every target time is above it."
    )
    strength: float = Field(0.7, ge=0.01, le=1, description="Noise strength; only epsilon * strength^2 matters.")
    detach_velocity: bool = Field(False, description="Stop the gradient at the diagonal velocity v.")
    floor: float | None = Field(
        None, gt=0, lt=1, description="Minimum of 1 - s in mean and std; the published code uses 0.05. null: no floor."
    )
    truncate: bool = Field(
        False, description="Take min(epsilon, s), so that the anchor of an early target time is the data end."
    )

    def requires(self) -> Requirements:
        least = 0.0 if self.truncate else self.epsilon
        return Requirements(anchors="any", path="linear", calls=2, min_target_time=least)


class _BaselineConfig(StochasticizerConfig):
    def requires(self) -> Requirements:
        return Requirements(anchors="any", path="linear", calls=1, min_target_time=0.0)


class FlowSdeConfig(_BaselineConfig):
    """Flow-GRPO's SDE."""

    noise_level: float = Field(
        0.7, ge=_LEAST_NOISE, le=_LARGEST_NOISE, description="Factor k of the diffusion eta = k sqrt(t / (1 - t))."
    )


class DanceSdeConfig(_BaselineConfig):
    """DanceGRPO's SDE."""

    noise_level: float = Field(0.3, ge=_LEAST_NOISE, le=_LARGEST_NOISE, description="The constant diffusion eta.")


class CpsConfig(_BaselineConfig):
    """Flow-CPS."""

    noise_level: float = Field(
        0.8, ge=_LEAST_NOISE, le=1, description="Share k of the noise that is fresh: std = s sin(k pi/2)."
    )
    published_log_prob: bool = Field(
        False,
        description="Use -mean (x - mean)^2 as log-probability, as the published code does, instead of the Gaussian.",
    )


class NaiveNoiseConfig(_BaselineConfig):
    """Noise on top of the map."""

    noise_level: float = Field(0.7, ge=_LEAST_NOISE, le=_LARGEST_NOISE, description="Factor k of the std k s.")
