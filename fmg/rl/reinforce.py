"""REINFORCE on the transition densities of a stochasticized flow map: the control without ratio or clip."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core import metric_keys as keys
from fmg.core.protocols import Policies, Stochasticizer
from fmg.core.types import Batch, Loss, ScoredRollout
from fmg.rl.configs import ReinforceConfig
from fmg.rl.grpo import transition_rows
from fmg.rl.replay import Unbound, log_probs, mean_distance, replay


class Reinforce:
    """`L = -mean_k A log p(x_s | x_t)` at the stored transitions, with a leave-one-out baseline (docs/math.md, eq. 42).

    The baseline of a sample is the mean reward of the other m - 1 of its group (RLOO, Ahmadian et al., arXiv
    2402.14740), so `A = m / (m - 1) (R - mean_group)`. There is one update per iteration, because only at the policy of
    the rollout is the gradient that of the expected reward.

    Departures from the paper: `R - mean_group` is divided by the std of the batch's rewards and clamped to
    `adv_clip_max`, which makes learning rates comparable with those of `grpo`; log-probs are averaged over latent
    coordinates; no KL to the base; groups with equal rewards are left out. The clamp comes before the factor, so both
    objectives limit the same samples and |A| is at most `m / (m - 1) adv_clip_max`.

    Batch rows: those of `fmg.rl.grpo.Grpo`, of chains and of branched rollouts, without `weight`.
    """

    needs: Literal["transitions"] = "transitions"
    clip_range: None = None

    def __init__(self, config: ReinforceConfig, stochasticizer: Stochasticizer | None = None) -> None:
        self.config = config
        self.stochasticizer: Stochasticizer = stochasticizer or Unbound("reinforce")

    def bind(self, stochasticizer: Stochasticizer) -> Reinforce:
        """The same objective on the transitions of `stochasticizer`."""
        return Reinforce(self.config, stochasticizer)

    def prepare(self, scored: ScoredRollout, policies: Policies, seed: int) -> Batch:
        """The stochastic transitions of the samples whose group has unequal rewards, with leave-one-out advantages.

        Raises:
            CompositionError: the rollout has no transitions.
        """
        return transition_rows(replace(scored, advantages=self.advantages(scored)), "reinforce")

    def advantages(self, scored: ScoredRollout) -> Float[Tensor, " n"]:
        """Rewards less the mean of the others of the group, from rewards less the mean of the group."""
        _, index, sizes = torch.unique(scored.rollout.groups, return_inverse=True, return_counts=True)
        size: Tensor = sizes[index].to(scored.advantages)
        # a group of one has no others, and no advantage either
        return scored.advantages * size / (size - 1).clamp(min=1)

    def loss(self, policies: Policies, batch: Batch) -> Loss:
        """Mean loss over the rows. Part `approx_kl`: the KL of the current policy to the one of the rollout."""
        density = replay(self.stochasticizer, policies.current, batch)
        total = -(batch.rows["advantage"] * log_probs(density, batch.rows["x_s"])).mean()
        with torch.no_grad():
            kl = mean_distance(density.mean, batch.rows["mean_old"], density.std).mean()
        return Loss(total, {keys.APPROX_KL: kl})
