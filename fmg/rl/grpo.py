"""The GRPO objective on the transition densities of a stochasticized flow map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fmg.core import metric_keys as keys
from fmg.core.errors import CompositionError
from fmg.core.protocols import Density, FlowMap, Policies, Stochasticizer
from fmg.core.types import Batch, BranchRollout, Conditioning, Loss, ScoredRollout, TransitionRollout
from fmg.rl.advantages import informative
from fmg.rl.configs import GrpoConfig, GrpoGuardConfig
from fmg.rl.replay import Unbound, log_probs, mean_distance, replay


class Grpo:
    """Clipped policy ratio with group advantages (Flow-Map GRPO, arXiv 2607.00535; docs/math.md, eq. 20-22).

    `L = -mean_k w min(r A, clip(r, 1 - c, 1 + c+) A) + beta KL`, with `r = exp(logp_new - logp_old)` at the stored
    states and log-probs averaged over latent coordinates.

    Variants by option (eq. 24-27 and 41): `ratio_norm`, also registered as the objective `grpo-guard`;
    `noise_weighting`; `clip_range_high`; `kl_mask`, DPPO's mask in place of the clip; `target_kl`, which the training
    loop acts on.

    Departures from the paper: time runs from noise (t = 1) to data (t = 0); the mean is over the rows whose group has
    unequal rewards, since the others have no gradient; the reference is the base with its adapter off. Of GRPO-Guard it
    has the ratio normalisation without the reweighting of gradients; of TempFlow-GRPO the noise weighting without
    trajectory branching.

    Batch rows of a chain, transition-major (all samples of the first transition, then of the second, ...):
        `x_t`, `x_s`, `mean_old`: (rows, *shape); `t`, `s`, `std`, `log_prob_old`, `advantage`, `weight`: (rows,) fp32;
        `step`: (rows,) int64, index of the grid interval. `weight` has mean 1.
    A branched rollout has one row per group: its `m` siblings share state and mean, so `x_s` is (rows, m, *shape), and
    `log_prob_old` and `advantage` are (rows, m). The loss of a row is the mean over its siblings, which equals that of
    `m` repeated rows (docs/math.md, eq. 31).
    """

    needs: Literal["transitions"] = "transitions"

    def __init__(self, config: GrpoConfig, stochasticizer: Stochasticizer | None = None) -> None:
        self.config = config
        self.stochasticizer: Stochasticizer = stochasticizer or Unbound("grpo")

    @property
    def clip_range(self) -> float:
        """Half-width of the ratio clip; the smaller one when its sides differ."""
        return min(self.config.clip_bounds)

    def bind(self, stochasticizer: Stochasticizer) -> Grpo:
        """The same objective on the transitions of `stochasticizer`."""
        return Grpo(self.config, stochasticizer)

    def prepare(self, scored: ScoredRollout, policies: Policies, seed: int) -> Batch:
        """Flattens the stochastic transitions of the samples whose group has unequal rewards.

        The batch has no rows when every group's rewards are equal.

        Raises:
            CompositionError: the rollout has no transitions.
        """
        batch = transition_rows(scored, "grpo")
        std = batch.rows["std"]
        weight = noise_weights(std, self.config.noise_power) if self.config.noise_weighting else torch.ones_like(std)
        return batch.with_rows(weight=weight)

    def loss(self, policies: Policies, batch: Batch) -> Loss:
        """Mean loss over the rows.

        Parts: `approx_kl`, the KL of the current policy to the one of the rollout; `ratio_mean`, `ratio_max`;
        `clip_frac`, the share of rows with `r` outside the clip, or that `kl_mask` masks; and with `kl_beta > 0`
        `kl_ref`.
        """
        rows = batch.rows
        density = replay(self.stochasticizer, policies.current, batch)
        ratio = self._log_ratio(density, rows).exp()
        with torch.no_grad():
            kl = mean_distance(density.mean, rows["mean_old"], density.std)
        surrogate, stopped = self._surrogate(ratio, rows["advantage"], kl)
        # siblings share their row
        by_row = surrogate if surrogate.ndim == 1 else surrogate.mean(1)
        total = (by_row * rows["weight"]).mean()
        with torch.no_grad():
            parts = {
                keys.APPROX_KL: kl.mean(),
                keys.RATIO_MEAN: ratio.mean(),
                keys.RATIO_MAX: ratio.max(),
                keys.CLIP_FRACTION: stopped.float().mean(),
            }
        if self.config.kl_beta > 0:
            kl_ref = self._reference_kl(policies.reference, density.mean, density.std, batch)
            total = total + self.config.kl_beta * kl_ref
            parts[keys.KL_REF] = kl_ref.detach()
        return Loss(total, parts)

    def _surrogate(
        self, ratio: Float[Tensor, "b *m"], advantage: Float[Tensor, "b *m"], kl: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b *m"], Bool[Tensor, "b *m"]]:
        """The surrogate, and where its ratio is clipped or masked."""
        if self.config.kl_mask is not None:
            return masked_surrogate(ratio, advantage, kl, self.config.kl_mask)
        low, high = self.config.clip_bounds
        return clipped_surrogate(ratio, advantage, low, high), (ratio < 1 - low) | (ratio > 1 + high)

    def _log_ratio(self, density: Density, rows: Mapping[str, Tensor]) -> Float[Tensor, "b *m"]:
        if self.config.ratio_norm:
            return normalised_log_ratio(density.mean, rows["mean_old"], rows["x_s"], density.std)
        return log_probs(density, rows["x_s"]) - rows["log_prob_old"]

    def _reference_kl(
        self, reference: FlowMap, mean: Float[Tensor, "b *shape"], std: Float[Tensor, " b"], batch: Batch
    ) -> Float[Tensor, ""]:
        with torch.no_grad():
            base = replay(self.stochasticizer, reference, batch).mean
        return mean_distance(mean, base, std).mean()


def grpo_guard(config: GrpoGuardConfig) -> Grpo:
    """`grpo` with `ratio_norm` on."""
    return Grpo(config)


def clipped_surrogate(
    ratio: Float[Tensor, "b *m"], advantage: Float[Tensor, "b *m"], low: float, high: float
) -> Float[Tensor, "b *m"]:
    """`-min(r A, clip(r, 1 - low, 1 + high) A)` (Schulman et al., arXiv 1707.06347, eq. 7).

    `high > low` is clip-higher (DAPO, Yu et al., arXiv 2503.14476; docs/math.md, eq. 26).
    """
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def masked_surrogate(
    ratio: Float[Tensor, "b *m"], advantage: Float[Tensor, "b *m"], kl: Float[Tensor, " b"], limit: float
) -> tuple[Float[Tensor, "b *m"], Bool[Tensor, "b *m"]]:
    """`-r A`, 0 where the row's KL to the rollout's policy has reached `limit` and the gradient would raise it further.

    The mask of DPPO (Qi et al., arXiv 2602.04879, eq. 12), with the exact KL of the two Gaussians; siblings share it
    (docs/math.md, eq. 41).
    """
    far = (kl >= limit).reshape(-1, *[1] * (ratio.ndim - 1))
    masked = (far & ((ratio - 1) * advantage > 0)).detach()
    return torch.where(masked, 0.0, -ratio * advantage), masked


def normalised_log_ratio(
    mean: Float[Tensor, "b *shape"],
    mean_old: Float[Tensor, "b *shape"],
    x_s: Tensor,
    std: Float[Tensor, " b"],
) -> Float[Tensor, "b *m"]:
    """GRPO-Guard's exponent `mean(xi * (mean - mean_old))` with `xi = (x_s - mean_old) / std` (docs/math.md, eq. 24).

    For Gaussians it equals `std * log_ratio + mean|mean - mean_old|^2 / (2 std)`: the log-ratio without its quadratic
    bias, times the std, so that its scale is the same at all noise levels. The product is computed directly, since that
    sum cancels most of its digits in fp32. The gradient flows through `mean` alone.

    Args:
        mean, mean_old, std: parameters of the densities.
        x_s: (b, *shape), or (b, m, *shape) for the siblings of a branched rollout, which share the mean.
    """
    if x_s.ndim > mean.ndim:
        return torch.stack([normalised_log_ratio(mean, mean_old, x, std) for x in x_s.unbind(1)], dim=1)
    noise = (x_s.float() - mean_old.float()).flatten(1) / std[:, None]
    return (noise * (mean.float() - mean_old.float()).flatten(1)).mean(1)


def noise_weights(std: Float[Tensor, " n"], power: float = 1.0) -> Float[Tensor, " n"]:
    """Weights proportional to a power of each transition's std, mean 1 (TempFlow-GRPO, arXiv 2508.04324; eq. 25)."""
    scaled = std**power
    return scaled / scaled.mean()


def transition_rows(scored: ScoredRollout, objective: str) -> Batch:
    """The stochastic transitions of the samples whose group has unequal rewards; rows as documented by `Grpo`.

    Raises:
        CompositionError: the rollout has no transitions.
    """
    rollout = scored.rollout
    keep = informative(scored.advantages, rollout.groups).cpu()
    if isinstance(rollout, BranchRollout):
        return Batch(*_star_rows(rollout, scored.advantages, keep))
    if isinstance(rollout, TransitionRollout):
        return Batch(*_chain_rows(rollout, scored.advantages, keep))
    raise CompositionError(
        f"The objective '{objective}' got a rollout without transition densities",
        "Use a stochasticizer in the rollout, or choose an objective that needs samples only.",
    )


def _chain_rows(
    rollout: TransitionRollout, advantages: Float[Tensor, " n"], keep: Bool[Tensor, " n"]
) -> tuple[dict[str, Tensor], Conditioning]:
    index = keep.nonzero().squeeze(1)
    kept = index.to(rollout.x0.device)
    steps = rollout.transitions
    rows = {
        "x_t": torch.cat([step.x_t[kept] for step in steps]),
        "x_s": torch.cat([step.x_s[kept] for step in steps]),
        "t": torch.cat([step.t[kept] for step in steps]),
        "s": torch.cat([step.s[kept] for step in steps]),
        "mean_old": torch.cat([step.mean[kept] for step in steps]),
        "std": torch.cat([step.std[kept] for step in steps]),
        "log_prob_old": torch.cat([step.log_prob[kept] for step in steps]),
        "advantage": advantages.to(kept.device, torch.float32)[kept].repeat(len(steps)),
        "step": torch.cat([torch.full_like(kept, step.index) for step in steps]),
    }
    return rows, rollout.cond.select(index.repeat(len(steps)))


def _star_rows(
    rollout: BranchRollout, advantages: Float[Tensor, " n"], keep: Bool[Tensor, " n"]
) -> tuple[dict[str, Tensor], Conditioning]:
    count, size = rollout.log_prob.shape
    index = keep.reshape(count, size).any(1).nonzero().squeeze(1)
    kept = index.to(rollout.x0.device)
    rows = {
        "x_t": rollout.x_t[kept],
        "x_s": rollout.x_s[kept],
        "t": rollout.t[kept],
        "s": rollout.s[kept],
        "mean_old": rollout.mean[kept],
        "std": rollout.std[kept],
        "log_prob_old": rollout.log_prob[kept],
        "advantage": advantages.to(kept.device, torch.float32).reshape(count, size)[kept],
        "step": rollout.step.to(kept.device)[kept],
    }
    return rows, rollout.cond.select(index * size)
