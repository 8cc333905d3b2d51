"""Evaluating the transitions of a batch again under a policy: what ratios, KLs and the replay gate rest on."""

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
    """Log-densities of the rows (b, *shape), or of `m` siblings a row (b, m, *shape), averaged over coordinates."""
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

    Rollout and update may use other shapes or kernels, whose rounding alone moves the ratio by more than the clip
    range. Gradients are enabled and thrown away, because kernels may differ with and without them. The means, which are
    as large as the states, are overwritten where they are, so no second copy of them is held.

    Args:
        stochasticizer: the one that drew the rollout.
        policies: views of the weights; `current` must still be the policy that drew the rollout.
        batch: rows as `fmg.rl.grpo.Grpo` documents them; its `mean_old` is overwritten.
        micro_batch: rows a network call, as in the update.
    """
    means, start = batch.rows["mean_old"], 0
    log_probs, stds = torch.empty_like(batch.rows["log_prob_old"]), torch.empty_like(batch.rows["std"])
    for part in batch.split(micro_batch):
        here = slice(start, start + len(part))
        log_probs[here], means[here], stds[here] = _as_in_an_update(stochasticizer, policies, part)
        start = here.stop
    return batch.with_rows(log_prob_old=log_probs, std=stds)


def replay_ratio(stochasticizer: Stochasticizer, policies: Policies, batch: Batch, micro_batch: int) -> float:
    """Largest `|r - 1|` over the rows under the current policy: 0 before the first update, but for rounding.

    Arguments as in `refresh_old`; nothing is overwritten. A batch without rows gives 0.
    """
    largest = 0.0
    for part in batch.split(micro_batch):
        log_prob, _, _ = _as_in_an_update(stochasticizer, policies, part)
        error = float(torch.expm1(log_prob - part.rows["log_prob_old"]).abs().max())
        # a comparison with a number that is none must not hide it
        largest = error if not error <= largest else largest
    return largest


def _as_in_an_update(
    stochasticizer: Stochasticizer, policies: Policies, part: Batch
) -> tuple[Float[Tensor, "b *m"], Float[Tensor, "b *shape"], Float[Tensor, " b"]]:
    """Log-prob, mean and std of a forward pass that records gradients; its graph ends here, before the next begins."""
    with torch.enable_grad():
        density = replay(stochasticizer, policies.current, part)
        log_prob = log_probs(density, part.rows["x_s"])
    return log_prob.detach(), density.mean.detach(), density.std.detach()


class Unbound:
    """Stands for the stochasticizer of an objective that has not been given one yet."""

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
        """Refuses.

        Raises:
            CompositionError: always.
        """
        raise CompositionError(
            f"The objective '{self._objective}' has no stochasticizer",
            "Call objective.bind(stochasticizer) with the one that draws the rollout.",
        )
