"""Objectives on finished samples that compare the trained policy's error with the old one's (docs/objectives.md).

All of them add noise to samples (`fmg.rl.noised`) and measure the error of the predicted velocity: DiffusionNFT and
MeanFlowNFT contrast good and bad samples, advantage weighted matching uses the change of the error as a log-ratio, and
MeanFlowAdvantage is a signed least squares. No sample needs a likelihood, so rollouts use the map's own sampler.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core import metric_keys as keys
from fmg.core.protocols import Policies, Stochasticizer
from fmg.core.types import Batch, Loss, ScoredRollout
from fmg.flow.path import expand
from fmg.rl.configs import (
    AwmConfig,
    DiffusionNftConfig,
    ForwardConfig,
    MeanFlowAdvantageConfig,
    MeanFlowConfig,
    MeanFlowNftConfig,
)
from fmg.rl.grpo import clipped_surrogate
from fmg.rl.noised import error_scale, mean_square, noised, scaled_square, shared_correction, velocity_error

Config = TypeVar("Config", bound=ForwardConfig)


class Errors(NamedTuple):
    """Velocity errors of a micro-batch's rows, and what weights them.

    Attributes:
        new: of the trained policy, with gradients.
        old: of the old policy.
        base: of the base; equal to `new`, detached, where the objective gives it no weight.
        advantage: advantage of each row's sample.
        t, sigma: time and noise coefficient of each row.
    """

    new: Float[Tensor, "b *shape"]
    old: Float[Tensor, "b *shape"]
    base: Float[Tensor, "b *shape"]
    advantage: Float[Tensor, " b"]
    t: Float[Tensor, " b"]
    sigma: Float[Tensor, " b"]


class ForwardObjective(ABC, Generic[Config]):
    """What the objectives of this module share; each states the loss of a row.

    The predictions of the old policy and of the base belong to the loss: every row is in one update, so they are
    computed once, a micro-batch at a time, by the process that has the row. The old policy does not change during the
    updates of an iteration.
    """

    needs: Literal["samples"] = "samples"
    clip_range: None = None
    name: ClassVar[str]

    def __init__(self, config: Config) -> None:
        self.config = config

    def bind(self, stochasticizer: Stochasticizer) -> Self:
        """Returns itself: no density is needed."""
        return self

    def prepare(self, scored: ScoredRollout, policies: Policies, seed: int) -> Batch:
        """Noises every sample `draws` times (`fmg.rl.noised.noised`); no rows when every group's rewards are equal.

        Raises:
            CompositionError: the map has no velocity target.
        """
        return noised(scored, policies.current, self.config.noising, seed, self.name)

    def loss(self, policies: Policies, batch: Batch) -> Loss:
        """Mean loss over the rows.

        Parts: `match`, the mean square of the error; `old_distance`, that of its difference from the old policy's,
        which is 0 before the first update of a rollout by the trained policy; `base_distance`, where it has a weight.
        """
        config = self.config
        with torch.no_grad():
            shared = torch.zeros((), device=batch.rows["t"].device)
            if isinstance(config, MeanFlowConfig) and "s" in batch.rows:
                shared = shared_correction(policies.old, batch, config.derivative, config.difference)
            old = velocity_error(policies.old, batch) + shared
        new = velocity_error(policies.current, batch) + shared
        base = new.detach()
        if config.reference_weight > 0:
            with torch.no_grad():
                base = velocity_error(policies.reference, batch) + shared
        t = batch.rows["t"]
        errors = Errors(new, old, base, batch.rows["advantage"], t, policies.current.path.sigma(t))
        total = self._by_row(errors).mean()
        with torch.no_grad():
            parts = {keys.MATCH: mean_square(new).mean(), keys.OLD_DISTANCE: mean_square(new - old).mean()}
            if config.reference_weight > 0:
                parts[keys.BASE_DISTANCE] = mean_square(new - base).mean()
        return Loss(total, parts)

    @abstractmethod
    def _by_row(self, errors: Errors) -> Float[Tensor, " b"]:
        """The loss of each row."""


class DiffusionNft(ForwardObjective[DiffusionNftConfig | MeanFlowNftConfig]):
    """Negative-aware fine-tuning on the forward process (DiffusionNFT, Zheng et al., arXiv 2509.16117, eq. 5).

    With the velocity v, its copy `v_old` and `v+- = v_old +- b (v - v_old)`, predictions of the sample
    `x+- = x_t - t v+-`, and an optimality `r = clip(A / (2 c) + 1/2, 0, 1)` of the advantage A in [-c, c]:

        L = c/b [ r |x+ - x_0|^2 / w+ + (1 - r) |x- - x_0|^2 / w- ] + beta |v - v_ref|^2,   w+- = sg mean|x+- - x_0|

    (docs/math.md, eq. 37), squares averaged over coordinates. At `v = v_old` the gradient is that of
    `A |x - x_0|^2 / w`, whatever b.

    Departures from the paper: times are uniform and shifted instead of those of a 10-step sampler; the decay of the old
    policy rises by iterations, where its code counts optimizer steps; on a two-time map only the diagonal is trained,
    and intervals `s < t` follow through shared weights only; a single-time map has the velocity
    `(x_t - X_{t->0}(x_t)) / t` of its prediction of the sample, and is trained as a denoiser; groups with equal rewards
    are left out.

    Batch rows: those of `fmg.rl.noised.noised`.
    """

    name = "diffusion-nft"

    def _by_row(self, errors: Errors) -> Float[Tensor, " b"]:
        config, sigma = self.config, expand(errors.sigma, errors.new)
        step = config.nft_beta * (errors.new - errors.old)
        optimality = (errors.advantage / (2 * config.adv_clip_max) + 0.5).clamp(0, 1)
        good, bad = scaled_square(sigma * (errors.old + step)), scaled_square(sigma * (errors.old - step))
        contrast = optimality * good + (1 - optimality) * bad
        return config.adv_clip_max / config.nft_beta * contrast + config.kl_beta * mean_square(errors.new - errors.base)


class MeanFlowNft(DiffusionNft):
    """DiffusionNFT for average velocities (MeanFlowNFT, Huang et al., arXiv 2607.15273).

    A two-time map predicts `u(x_t, t, s)`; by the MeanFlow identity the velocity at t is `V = u + (t - s) D`, D the
    derivative of `u_old` along `(eps - x_0, 1)`. DiffusionNFT's loss is taken on V and `V_old`, which share D
    (docs/math.md, eq. 37 and 38). Half of the intervals are diagonal, a quarter ends at s = 0, a quarter anywhere.

    Departures from the paper: t is uniform before the shift and s uniform within (0, t), where its code takes the
    larger and the smaller of two uniform times and shifts both (`ordered_times` does too), t also for s = t and s = 0;
    the lowest time is .01 instead of 0, and the shares hold on average; the decay of the old policy as in
    `DiffusionNft`; differences are shortened at the ends of [s, 1]; `derivative: jvp` is exact; groups with equal
    rewards are left out.
    """

    name = "meanflow-nft"


class MeanFlowAdvantage(ForwardObjective[MeanFlowAdvantageConfig]):
    """Signed least squares on average velocities (MeanFlowAdvantage, Tang et al., arXiv 2609.37670, eq. 10 and 12).

    With the regression target `ubar = (eps - x_0) - (t - s) D` of MeanFlow training, D shared as in MeanFlowNFT, and A
    in [-1, 1]:

        L = t^2 / w ( A |u - ubar|^2 + gamma |u - u_old|^2 + lambda |u - u_ref|^2 ),   w = sg mean|t (u - ubar)|

    (docs/math.md, eq. 39). `A + gamma + lambda > 0` keeps it convex, so a bad sample pushes away by a bounded step.

    Departures from the paper: rewards are divided by the std of the batch as `reward_combination` says, which for the
    default is the paper's; the old policy, whose schedule in its image runs is not published, the general intervals and
    the differences are as in `MeanFlowNft`; w in fp32; groups with equal rewards are left out, though their samples
    would still contribute to the old and base terms.
    """

    name = "mean-flow-advantage"

    def _by_row(self, errors: Errors) -> Float[Tensor, " b"]:
        config = self.config
        total = (
            errors.advantage * mean_square(errors.new)
            + config.old_weight * mean_square(errors.new - errors.old)
            + config.base_weight * mean_square(errors.new - errors.base)
        )
        return errors.sigma.square() * total / error_scale(expand(errors.sigma, errors.new) * errors.new)


class AdvantageWeightedMatching(ForwardObjective[AwmConfig]):
    """A policy ratio of matching errors (advantage weighted matching, Xue et al., arXiv 2509.25050, algorithm 1).

    The weighted matching error acts as the negative log-likelihood of a sample, `log p = -w_t |v - (eps - x_0)|^2`,
    at the same noise for the trained policy and the old one, in the clipped surrogate of GRPO with A scaled to [-1, 1]:

        L = -min(r A, clip(r, 1 - c, 1 + c) A) + beta |v - v_ref|^2,   r = exp(log p - log p_old)

    (docs/math.md, eq. 40). Defaults are those of the published SD3.5 run on GenEval, whose weight `ghuber` is
    `log p = -t (|e|^(2 q) - 1e-10^q) / q`.

    Departures from the paper: its code adds a distance to a moving average of the policy that the paper does not
    state, left out here; times are uniform and shifted instead of one in each sixth of a 14-step sampler; two-time and
    single-time maps as in `DiffusionNft`; groups with equal rewards are left out.
    """

    name = "awm"

    def _by_row(self, errors: Errors) -> Float[Tensor, " b"]:
        width, advantage = self.config.clip_range, errors.advantage / self.config.adv_clip_max
        ratio = (self._log_prob(errors.new, errors.t) - self._log_prob(errors.old, errors.t)).exp()
        distance = mean_square(errors.new - errors.base)
        return clipped_surrogate(ratio, advantage, width, width) + self.config.kl_beta * distance

    def _log_prob(self, error: Float[Tensor, "b *shape"], t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        square, power = mean_square(error), self.config.ghuber_power
        if self.config.weighting == "ghuber":
            # the small number keeps the gradient finite where the error is 0
            log_prob: Tensor = -t * ((square + 1e-10) ** power - 1e-10**power) / power
            return log_prob
        weights = {"uniform": torch.ones_like(t), "t": t, "t2": t.square()}
        return -square * weights[self.config.weighting]
