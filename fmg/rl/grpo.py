"""The GRPO objective on the transition densities of a stochasticized flow map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CompositionError
from fmg.core.protocols import Density, FlowMap, Policies, Stochasticizer
from fmg.core.types import Batch, Loss, ScoredRollout, TransitionRollout
from fmg.registry import objectives
from fmg.rl.advantages import informative
from fmg.rl.configs import GrpoConfig, GrpoGuardConfig
from fmg.rl.replay import Unbound, mean_distance, replay


@objectives.register("grpo", GrpoConfig)
class Grpo:
    """Clipped policy ratio with group advantages (Flow-Map GRPO, arXiv 2607.00535; docs/math.md, eq. 20-22).

    `L = -mean_k w min(r A, clip(r, 1 - c, 1 + c+) A) + beta KL`, with `r = exp(logp_new - logp_old)` at the stored
    states and log-probs averaged over latent coordinates.

    Variants by option (eq. 24-27): `ratio_norm`, which is also registered as the objective `grpo-guard`;
    `noise_weighting`; `clip_range_high`; `target_kl`, which the loop acts on.

    Departures from the paper: time runs from noise (t = 1) to data (t = 0); the mean runs over the rows whose group has
    unequal rewards, the others have no gradient and are left out; the reference is the base with its adapter off.
    Of GRPO-Guard it has the ratio normalisation without the reweighting of gradients; of TempFlow-GRPO the noise
    weighting without trajectory branching.

    Batch rows, transition-major (all samples of the first transition, then of the second, ...):
        `x_t`, `x_s`, `mean_old`: (rows, *shape); `t`, `s`, `std`, `log_prob_old`, `advantage`, `weight`: (rows,) fp32;
        `step`: (rows,) int64, index of the grid interval. `weight` has mean 1.
    """

    needs: Literal["transitions"] = "transitions"

    def __init__(self, config: GrpoConfig, stochasticizer: Stochasticizer | None = None) -> None:
        self.config = config
        self.stochasticizer: Stochasticizer = stochasticizer or Unbound("grpo")

    @property
    def clip_range(self) -> float:
        """Half-width of the ratio clip, the narrower one when its sides differ."""
        return min(self.config.clip_bounds)

    def bind(self, stochasticizer: Stochasticizer) -> Grpo:
        """The same objective on the transitions of `stochasticizer`."""
        return Grpo(self.config, stochasticizer)

    def prepare(self, scored: ScoredRollout, policies: Policies, seed: int) -> Batch:
        """Flattens the stochastic transitions of the samples whose group has unequal rewards.

        The batch has no rows when every group's rewards are equal; there is nothing to learn from such a rollout.

        Raises:
            CompositionError: for a rollout without transitions.
        """
        rollout = scored.rollout
        if not isinstance(rollout, TransitionRollout):
            raise CompositionError(
                "The objective 'grpo' got a rollout without transition densities",
                "Roll out with a stochasticizer, or choose an objective that needs samples only.",
            )
        keep = informative(scored.advantages, rollout.groups).cpu().nonzero().squeeze(1)
        kept = keep.to(rollout.x0.device)
        advantage = scored.advantages.to(kept.device, torch.float32)[kept]
        steps = rollout.transitions
        std = torch.cat([step.std[kept] for step in steps])
        rows = {
            "x_t": torch.cat([step.x_t[kept] for step in steps]),
            "x_s": torch.cat([step.x_s[kept] for step in steps]),
            "t": torch.cat([step.t[kept] for step in steps]),
            "s": torch.cat([step.s[kept] for step in steps]),
            "mean_old": torch.cat([step.mean[kept] for step in steps]),
            "std": std,
            "log_prob_old": torch.cat([step.log_prob[kept] for step in steps]),
            "advantage": advantage.repeat(len(steps)),
            "weight": noise_weights(std) if self.config.noise_weighting else torch.ones_like(std),
            "step": torch.cat([torch.full_like(kept, step.index) for step in steps]),
        }
        return Batch(rows, rollout.cond.select(keep.repeat(len(steps))))

    def loss(self, policies: Policies, batch: Batch) -> Loss:
        """Mean loss over the rows.

        Parts: `approx_kl`, the KL of the current policy to the one that drew the rollout; `ratio_mean`, `ratio_max`;
        `clip_frac`, the share of rows with `r` outside the clip; and with `kl_beta > 0` `kl_ref`.
        """
        rows = batch.rows
        density = replay(self.stochasticizer, policies.current, batch)
        low, high = self.config.clip_bounds
        ratio = self._log_ratio(density, rows).exp()
        total = (clipped_surrogate(ratio, rows["advantage"], low, high) * rows["weight"]).mean()
        with torch.no_grad():
            parts = {
                "approx_kl": mean_distance(density.mean, rows["mean_old"], density.std).mean(),
                "ratio_mean": ratio.mean(),
                "ratio_max": ratio.max(),
                "clip_frac": ((ratio < 1 - low) | (ratio > 1 + high)).float().mean(),
            }
        if self.config.kl_beta > 0:
            kl_ref = self._reference_kl(policies.reference, density.mean, density.std, batch)
            total = total + self.config.kl_beta * kl_ref
            parts["kl_ref"] = kl_ref.detach()
        return Loss(total, parts)

    def _log_ratio(self, density: Density, rows: Mapping[str, Tensor]) -> Float[Tensor, " b"]:
        if self.config.ratio_norm:
            return normalised_log_ratio(density.mean, rows["mean_old"], rows["x_s"], density.std)
        return density.log_prob(rows["x_s"]) - rows["log_prob_old"]

    def _reference_kl(
        self, reference: FlowMap, mean: Float[Tensor, "b *shape"], std: Float[Tensor, " b"], batch: Batch
    ) -> Float[Tensor, ""]:
        with torch.no_grad():
            base = replay(self.stochasticizer, reference, batch).mean
        return mean_distance(mean, base, std).mean()


@objectives.register("grpo-guard", GrpoGuardConfig)
def grpo_guard(config: GrpoGuardConfig) -> Grpo:
    """`grpo` with `ratio_norm` on."""
    return Grpo(config)


def clipped_surrogate(
    ratio: Float[Tensor, " b"], advantage: Float[Tensor, " b"], low: float, high: float
) -> Float[Tensor, " b"]:
    """`-min(r A, clip(r, 1 - low, 1 + high) A)` (Schulman et al., arXiv 1707.06347, eq. 7).

    `high > low` is clip-higher (DAPO, Yu et al., arXiv 2503.14476; docs/math.md, eq. 26).
    """
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def normalised_log_ratio(
    mean: Float[Tensor, "b *shape"],
    mean_old: Float[Tensor, "b *shape"],
    x_s: Float[Tensor, "b *shape"],
    std: Float[Tensor, " b"],
) -> Float[Tensor, " b"]:
    """GRPO-Guard's exponent `mean(xi * (mean - mean_old))` with `xi = (x_s - mean_old) / std` (docs/math.md, eq. 24).

    For Gaussians it equals `std * log_ratio + mean|mean - mean_old|^2 / (2 std)`: the log-ratio without its quadratic
    bias, times the std, so that it has one scale at steps of different noise. The product is taken directly, since that
    sum cancels most of its digits in fp32. The gradient flows through `mean` alone.
    """
    noise = (x_s.float() - mean_old.float()).flatten(1) / std[:, None]
    return (noise * (mean.float() - mean_old.float()).flatten(1)).mean(1)


def noise_weights(std: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Weights proportional to the std of each transition, mean 1 (TempFlow-GRPO, arXiv 2508.04324; eq. 25)."""
    return std / std.mean()
