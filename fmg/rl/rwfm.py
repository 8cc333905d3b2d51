"""Reward-weighted flow matching, an objective that needs only finished samples and no density."""

from __future__ import annotations

from typing import Literal

import torch

from fmg.core import metric_keys as keys
from fmg.core.protocols import Policies, Stochasticizer
from fmg.core.types import Batch, Loss, ScoredRollout
from fmg.rl.configs import RwfmConfig
from fmg.rl.noised import mean_square, noised, predicted


class RewardWeightedFlowMatching:
    """Flow matching on the policy's own samples with weights `exp(A / temperature)` (Fan et al., arXiv 2502.06061).

    For a sample `x_0` and noise `eps`, `x_t = alpha_t x_0 + sigma_t eps` with t uniform (docs/math.md, eq. 23):
    a two-time map matches its diagonal `u(x_t, t, t)` to the velocity `eps - x_0` of the linear path; a single-time map
    matches `X_{t->0}(x_t)` to `x_0`.

    Departures from the paper: weights come from group advantages instead of raw rewards; no Wasserstein regulariser;
    on a two-time map only the diagonal is trained, and intervals `s < t` follow through shared weights only; a
    single-time map is trained as a denoiser, which blurs it where several samples explain one `x_t`; groups with equal
    rewards are left out.

    Batch rows: those of `fmg.rl.noised.noised`, and `weight`: (rows,), mean 1.
    """

    needs: Literal["samples"] = "samples"
    clip_range: None = None

    def __init__(self, config: RwfmConfig) -> None:
        self.config = config

    def bind(self, stochasticizer: Stochasticizer) -> RewardWeightedFlowMatching:
        """Returns itself: no density is needed."""
        return self

    def prepare(self, scored: ScoredRollout, policies: Policies, seed: int) -> Batch:
        """Draws `draws` noise levels per sample; no rows when every group's rewards are equal.

        Raises:
            CompositionError: a two-time map is not on the linear path.
        """
        batch = noised(scored, policies.current, self.config.noising, seed, "rwfm")
        weight = torch.softmax(batch.rows["advantage"] / self.config.temperature, 0) * len(batch)
        return batch.with_rows(weight=weight)

    def loss(self, policies: Policies, batch: Batch) -> Loss:
        """Weighted squared error, averaged over coordinates and rows. Part `match`: the unweighted error."""
        error = mean_square(predicted(policies.current, batch) - batch.rows["target"])
        return Loss((batch.rows["weight"] * error).mean(), {keys.MATCH: error.detach().mean()})
