"""Options of the objectives. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fmg.registry.config import ObjectiveConfig


class GrpoConfig(ObjectiveConfig):
    """Flow-Map GRPO (arXiv 2607.00535): clipped policy ratio on transition densities."""

    clip_range: float = Field(
        default=1e-4, gt=0, lt=1, description="half-width of the ratio clip; log-probs are averaged over coordinates"
    )
    clip_range_high: float | None = Field(
        default=None, gt=0, description="width of the clip above 1 (clip-higher); null takes clip_range"
    )
    kl_beta: float = Field(default=0.0, ge=0, description="weight of the KL to the adapter-off reference; 0 skips it")
    ratio_norm: bool = Field(
        default=False, description="ratio of the same scale at every step (GRPO-Guard) instead of the density ratio"
    )
    noise_weighting: bool = Field(
        default=False, description="weight transitions by their std, mean 1 over a rollout (TempFlow-GRPO)"
    )
    noise_power: float = Field(
        default=1.0, ge=-4, le=4, description="power of the std that noise_weighting weighs transitions by"
    )
    target_kl: float | None = Field(
        default=None,
        gt=0,
        description="policy KL after an update above which the iteration's other updates are skipped; null never skips",
    )

    @property
    def needs(self) -> Literal["transitions", "samples"]:
        return "transitions"

    @property
    def branches(self) -> bool:
        return True

    @property
    def compares_with(self) -> frozenset[Literal["old", "reference"]]:
        """The reference, if there is a KL to it; the rollout stores the densities of the old policy."""
        return frozenset({"reference"} if self.kl_beta > 0 else ())

    @property
    def kl_limit(self) -> float | None:
        return self.target_kl

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """Widths of the clip below and above 1."""
        return self.clip_range, self.clip_range if self.clip_range_high is None else self.clip_range_high


class GrpoGuardConfig(GrpoConfig):
    """GRPO with GRPO-Guard's ratio normalisation (arXiv 2510.22319); every other option is that of `grpo`.

    The normalised log-ratio is smaller than the plain one by the factor std, so the same clip range binds later.
    """

    ratio_norm: Literal[True] = Field(default=True, description="always on; `grpo` has it as an option")


class RwfmConfig(ObjectiveConfig):
    """Reward-weighted flow matching (Fan et al., arXiv 2502.06061, online form) on finished samples."""

    temperature: float = Field(default=1.0, gt=0, description="weights are exp(advantage / temperature), mean 1")
    draws: int = Field(default=4, ge=1, description="noise levels sampled for each image of a rollout")

    @property
    def needs(self) -> Literal["transitions", "samples"]:
        return "samples"

    def rows_per_sample(self, transitions: int) -> int:
        return self.draws

    @property
    def compares_with(self) -> frozenset[Literal["old", "reference"]]:
        return frozenset()


class RewardGradientConfig(ObjectiveConfig):
    """Backpropagation of differentiable rewards through the last jumps and the decoder (DRaFT-K, DRaFT-LV, ReFL)."""

    method: Literal["draft", "draft-lv", "refl"] = Field(
        default="draft",
        description="draft: the last jumps of the sampler; draft-lv: the last jump, from several re-noisings of the"
        " sample; refl: one jump to 0 from a random time of the grid",
    )
    jumps: int = Field(default=1, ge=1, le=1000, description="jumps of draft that record gradients, K in DRaFT-K")
    draws: int = Field(default=2, ge=1, description="re-noisings of each sample in draft-lv")
    l2_beta: float = Field(
        default=0.0, ge=0, description="weight of the squared distance of each jump to that of the base; 0 skips it"
    )
    checkpointing: bool | None = Field(
        default=None,
        description="whether activations of jumps, decoder and rewards are computed again in the backward pass, for the"
        " memory of the largest of them in place of their sum; null: on a GPU",
    )

    @model_validator(mode="after")
    def _without_advantages(self) -> Self:
        for name in ("adv_clip_max", "global_std", "reward_combination"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is about advantages, which this objective does not use")
        return self

    @property
    def needs(self) -> Literal["transitions", "samples", "gradients"]:
        return "gradients"

    def trained_calls(self, calls: int) -> int:
        return self.jumps if self.method == "draft" else 1

    def rows_per_sample(self, transitions: int) -> int:
        return self.draws if self.method == "draft-lv" else 1

    @property
    def compares_with(self) -> frozenset[Literal["old", "reference"]]:
        return frozenset({"reference"} if self.l2_beta > 0 else ())
