"""Options of the objectives. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from fmg.core.protocols import Needs
from fmg.core.specs import MapSpec
from fmg.registry.config import ObjectiveConfig

_NFT_BETA = "distance of the implicit good and bad policies from the old one, relative to that of the trained policy"
_KL_BETA = "weight of the squared velocity distance to the adapter-off reference; 0 skips it"
_OLD_DECAY = "decay of the old policy, which generates the rollouts; 0: the trained policy generates them"
_OLD_RISE = "rise of that decay per iteration, from 0 to old_decay; null: constant"


class GrpoConfig(ObjectiveConfig):
    """Flow-Map GRPO (arXiv 2607.00535): clipped policy ratio on transition densities."""

    needs: ClassVar[Needs] = "transitions"
    branches: ClassVar[bool] = True

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
    kl_mask: float | None = Field(
        default=None,
        gt=0,
        description="limit on the policy KL of a row, beyond which updates that would raise it have no gradient (DPPO;"
        " published: 1e-6); replaces the clip. null: the clip is used",
    )
    target_kl: float | None = Field(
        default=None,
        gt=0,
        description="policy KL after an update above which the iteration's other updates are skipped; null never skips",
    )

    @property
    def compares_with(self) -> frozenset[Literal["old", "reference"]]:
        """The reference, if there is a KL to it; the rollout stores the densities of the old policy."""
        return frozenset({"reference"} if self.kl_beta > 0 else ())

    def frozen_calls(self, calls: int) -> float:
        return calls if self.kl_beta > 0 else 0

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


class ReinforceConfig(ObjectiveConfig):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al., arXiv 2402.14740): neither ratio nor clip."""

    needs: ClassVar[Needs] = "transitions"
    branches: ClassVar[bool] = True
    on_policy: ClassVar[bool] = True
    compares_with: ClassVar[frozenset[Literal["old", "reference"]]] = frozenset()

    global_std: Literal[True] = Field(default=True, description="always on: a group's own std is not a constant factor")


@dataclass(frozen=True)
class Noising:
    """How noise is added to finished samples.

    Attributes:
        draws: noise levels of each sample.
        min_time: the lowest time.
        time_shift: times t become `shift t / (1 + (shift - 1) t)`.
        diagonal: share of the rows with `s = t`.
        to_data: share of the rows with `s = 0`; the others have s within (0, t).
        ordered: whether t and such an s are the larger and the smaller of two uniform times, both shifted; if not, t is
            uniform before the shift, and s uniform in (0, t).
    """

    draws: int
    min_time: float = 0.0
    time_shift: float = 1.0
    diagonal: float = 1.0
    to_data: float = 0.0
    ordered: bool = False


class NoisedConfig(ObjectiveConfig):
    """Options of the objectives on finished samples, to which noise is added again."""

    needs: ClassVar[Needs] = "samples"

    draws: int = Field(default=4, ge=1, description="noise levels sampled for each image of a rollout")

    @property
    def noising(self) -> Noising:
        """How the samples are noised."""
        return Noising(self.draws)

    def rows_per_sample(self, transitions: int) -> int:
        return self.draws

    @property
    def compares_with(self) -> frozenset[Literal["old", "reference"]]:
        return frozenset()

    def misfit(self, spec: MapSpec) -> tuple[str, str] | None:
        if spec.anchors == "any" and spec.path != "linear":
            return f"has no velocity target on the path '{spec.path}'", "Use a model on the linear path"
        return None


class RwfmConfig(NoisedConfig):
    """Reward-weighted flow matching (Fan et al., arXiv 2502.06061, online form) on finished samples."""

    temperature: float = Field(default=1.0, gt=0, description="weights are exp(advantage / temperature), mean 1")


class ForwardConfig(NoisedConfig):
    """Options of the objectives that compare the prediction of the trained policy with that of the old one."""

    time_shift: float = Field(
        default=3.0, gt=0, description="shift of the training times towards noise; 1 keeps them uniform"
    )
    min_time: float = Field(default=0.01, ge=0, lt=1, description="lowest training time")

    @property
    def noising(self) -> Noising:
        return Noising(self.draws, self.min_time, self.time_shift)

    @property
    def reference_weight(self) -> float:
        """Weight of the distance to the base."""
        return 0.0

    @property
    def compares_with(self) -> frozenset[Literal["old", "reference"]]:
        return frozenset({"old", "reference"} if self.reference_weight > 0 else {"old"})

    def frozen_calls(self, calls: int) -> float:
        return len(self.compares_with)


class AwmConfig(ForwardConfig):
    """Advantage weighted matching (Xue et al., arXiv 2509.25050): a policy ratio of matching errors."""

    draws: int = Field(default=6, ge=1, description="noise levels sampled for each image of a rollout")
    weighting: Literal["uniform", "t", "t2", "ghuber"] = Field(
        default="ghuber", description="weight of the matching error by time; ghuber also flattens large errors"
    )
    ghuber_power: float = Field(default=0.25, gt=0, le=1, description="power of the mean squared error in ghuber")
    clip_range: float = Field(default=1.0, gt=0, le=1, description="half-width of the ratio clip")
    kl_beta: float = Field(default=3e-3, ge=0, description=_KL_BETA)

    @property
    def reference_weight(self) -> float:
        return self.kl_beta


class MovingOldConfig(ForwardConfig):
    """Options of the objectives whose rollouts come from a moving average of the trained weights.

    The decay is that of the published code of DiffusionNFT and of MeanFlowNFT.
    """

    old_decay: float = Field(default=0.5, ge=0, lt=1, description=_OLD_DECAY)
    old_decay_rise: float | None = Field(default=1e-3, gt=0, description=_OLD_RISE)
    old_decay_start: int = Field(default=0, ge=0, description="iterations before that rise, with decay 0")

    @property
    def moving_old(self) -> Callable[[int], float] | None:
        return self._decay_after if self.old_decay > 0 else None

    def _decay_after(self, iterations: int) -> float:
        if iterations < self.old_decay_start:
            return 0.0
        if self.old_decay_rise is None:
            return self.old_decay
        return min(self.old_decay, (iterations - self.old_decay_start) * self.old_decay_rise)


class DiffusionNftConfig(MovingOldConfig):
    """DiffusionNFT (Zheng et al., arXiv 2509.16117): contrasts good and bad samples on the forward process."""

    nft_beta: float = Field(default=1.0, gt=0, le=10, description=_NFT_BETA)
    kl_beta: float = Field(default=1e-4, ge=0, description=_KL_BETA)

    @property
    def reference_weight(self) -> float:
        return self.kl_beta


class MeanFlowConfig(MovingOldConfig):
    """Options of the objectives on the average velocities of a two-time map."""

    diagonal: float = Field(default=0.5, ge=0, le=1, description="share of training intervals with s = t")
    to_data: float = Field(default=0.25, ge=0, le=1, description="share with s = 0; the others have s within (0, t)")
    ordered_times: bool = Field(
        default=False,
        description="t and s are the larger and the smaller of two uniform times, both shifted, as in the code of"
        " MeanFlowNFT; false: t is uniform before the shift, and s uniform within (0, t)",
    )
    derivative: Literal["central", "jvp"] = Field(
        default="central",
        description="derivative of the average velocity along the path: by two more calls, or by forward-mode AD",
    )
    difference: float = Field(default=5e-3, gt=0, le=0.1, description="step of the central difference")

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.diagonal + self.to_data > 1:
            raise ValueError("diagonal and to_data are shares of the rows: their sum is at most 1")
        return self

    @property
    def noising(self) -> Noising:
        shares = self.diagonal, self.to_data
        return Noising(self.draws, self.min_time, self.time_shift, *shares, self.ordered_times)

    def frozen_calls(self, calls: int) -> float:
        # a forward pass with tangents costs about two without
        return super().frozen_calls(calls) + 2 * (1 - self.diagonal)

    def misfit(self, spec: MapSpec) -> tuple[str, str] | None:
        if spec.map_name != "two-time":
            fix = "Use a two-time model, or diffusion-nft or awm, which need no average velocity"
            return f"needs a two-time map, but the model is a {spec.map_name} map", fix
        return super().misfit(spec)


class MeanFlowNftConfig(MeanFlowConfig, DiffusionNftConfig):
    """MeanFlowNFT (Huang et al., arXiv 2607.15273): DiffusionNFT on the velocity that an average velocity induces."""

    nft_beta: float = Field(default=0.1, gt=0, le=10, description=_NFT_BETA)


class MeanFlowAdvantageConfig(MeanFlowConfig):
    """MeanFlowAdvantage (Tang et al., arXiv 2609.37670): signed least squares on average velocities."""

    adv_clip_max: float = Field(default=1.0, gt=0, description="bound on the absolute advantage")
    reward_combination: Literal["sum", "per-reward"] = Field(
        default="per-reward",
        description="advantage of the weighted sum of rewards, or weighted sum of each reward's advantage (GDPO)",
    )
    old_weight: float = Field(default=1.1, ge=0, description="weight gamma of the distance to the old policy")
    base_weight: float = Field(default=1e-3, ge=0, description="weight lambda of the distance to the base")

    @model_validator(mode="after")
    def _convex(self) -> Self:
        if self.adv_clip_max >= self.old_weight + self.base_weight:
            raise ValueError(
                "adv_clip_max must be below old_weight + base_weight, or the loss of a bad sample has no minimum"
            )
        return self

    @property
    def reference_weight(self) -> float:
        return self.base_weight


class RewardGradientConfig(ObjectiveConfig):
    """Backpropagation of differentiable rewards through the last jumps and the decoder (DRaFT-K, DRaFT-LV, ReFL)."""

    needs: ClassVar[Needs] = "gradients"

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
        description="whether activations of jumps, decoder and rewards are recomputed in the backward pass, with"
        " only those of one of them in memory at a time; null: on a GPU only",
    )

    @model_validator(mode="after")
    def _without_advantages(self) -> Self:
        for name in ("adv_clip_max", "global_std", "reward_combination"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} concerns advantages, which this objective does not use")
        return self

    def trained_calls(self, calls: int) -> int:
        return self.jumps if self.method == "draft" else 1

    def frozen_calls(self, calls: int) -> float:
        return self.trained_calls(calls) if self.l2_beta > 0 else 0

    def rows_per_sample(self, transitions: int) -> int:
        return self.draws if self.method == "draft-lv" else 1

    @property
    def compares_with(self) -> frozenset[Literal["old", "reference"]]:
        return frozenset({"reference"} if self.l2_beta > 0 else ())
