"""Evaluates the transitions of a batch again under a policy, for ratios, KLs and the replay gate."""

from __future__ import annotations

from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CompositionError
from fmg.core.protocols import Density, FlowMap, Policies, Stochasticizer
from fmg.core.types import Batch, Conditioning

REFRESHED = ("log_prob_old", "mean_old", "std")
"""Columns of a batch that `refresh_old` recomputes."""


def replay(stochasticizer: Stochasticizer, flow_map: FlowMap, batch: Batch) -> Density:
    """The transition densities of the rows' `x_t`, `t`, `s` under `flow_map`."""
    rows = batch.rows
    return stochasticizer.transition(flow_map, rows["x_t"], rows["t"], rows["s"], batch.cond)


def log_probs(density: Density, x_s: Float[Tensor, "b *shape"]) -> Float[Tensor, "b *m"]:
    """Log-densities of rows (b, *shape), or of `m` siblings per row (b, m, *shape), averaged over coordinates."""
    if x_s.ndim == density.mean.ndim:
        return density.log_prob(x_s)
    return torch.stack([density.log_prob(x) for x in x_s.unbind(1)], dim=1)


def mean_distance(
    mean: Float[Tensor, "b *shape"], other: Float[Tensor, "b *shape"], std: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """KL of two Gaussians with one std, averaged over coordinates (docs/math.md, eq. 22), fp32."""
    return (mean.float() - other.float()).square().flatten(1).mean(1) / (2 * std.square())


def refresh_old(stochasticizer: Stochasticizer, policies: Policies, batch: Batch, micro_batch: int) -> Batch:
    """The batch with the columns `REFRESHED` recomputed by the current policy through the update path.

    Rollout and update may use different shapes or kernels, whose rounding alone can move the ratio by more than the
    clip range. Gradients are enabled and discarded, because kernels may differ with and without them. The means, as
    large as the states, are overwritten in place to save memory.

    Args:
        stochasticizer: the one of the rollout.
        policies: views of the weights; `current` must still be the policy of the rollout.
        batch: rows as documented by `fmg.rl.grpo.Grpo`; its `mean_old` is overwritten.
        micro_batch: rows of a forward pass, as in the update.
    """
    means, start = batch.rows["mean_old"], 0
    log_probs, stds = torch.empty_like(batch.rows["log_prob_old"]), torch.empty_like(batch.rows["std"])
    for part in batch.split(micro_batch):
        here = slice(start, start + len(part))
        log_probs[here], means[here], stds[here] = _as_in_an_update(stochasticizer, policies, part)
        start = here.stop
    return batch.with_rows(log_prob_old=log_probs, std=stds)


def replay_ratio(stochasticizer: Stochasticizer, policies: Policies, batch: Batch, micro_batch: int) -> float:
    """Largest `|r - 1|` over the rows under the current policy: 0 before the first update, up to rounding.

    Arguments as in `refresh_old`; nothing is overwritten. A batch without rows gives 0.
    """
    largest = 0.0
    for part in batch.split(micro_batch):
        log_prob, _, _ = _as_in_an_update(stochasticizer, policies, part)
        error = float(torch.expm1(log_prob - part.rows["log_prob_old"]).abs().max())
        # NaN must not be hidden by a comparison
        largest = error if not error <= largest else largest
    return largest


def _as_in_an_update(
    stochasticizer: Stochasticizer, policies: Policies, part: Batch
) -> tuple[Float[Tensor, "b *m"], Float[Tensor, "b *shape"], Float[Tensor, " b"]]:
    """Log-prob, mean and std of a forward pass that records gradients; its graph is freed here, before the next."""
    with torch.enable_grad():
        density = replay(stochasticizer, policies.current, part)
        log_prob = log_probs(density, part.rows["x_s"])
    return log_prob.detach(), density.mean.detach(), density.std.detach()


class Unbound:
    """Placeholder for the stochasticizer of an objective that is not bound to one yet."""

    path_preserving = False

    def __init__(self, objective: str) -> None:
        self._objective = objective

    def transition(
        self,
        flow_map: FlowMap,
        x_t: Float[Tensor, "b *shape"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"],
        cond: Conditioning,
    ) -> NoReturn:
        """Raises `CompositionError`."""
        raise CompositionError(
            f"The objective '{self._objective}' has no stochasticizer",
            "Call objective.bind(stochasticizer) with the one of the rollout.",
        )
