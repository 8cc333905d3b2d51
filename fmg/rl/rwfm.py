"""Reward-weighted flow matching, an objective that needs only finished samples and no density."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core import metric_keys as keys
from fmg.core.errors import CompositionError
from fmg.core.protocols import FlowMap, Policies, Stochasticizer
from fmg.core.types import Batch, Loss, ScoredRollout
from fmg.flow.path import expand
from fmg.rl.advantages import informative
from fmg.rl.configs import RwfmConfig
from fmg.rl.keyed_noise import OBJECTIVE, NoiseKey
from fmg.rl.rollouts import noise, uniform


class RewardWeightedFlowMatching:
    """Flow matching on the policy's own samples with weights `exp(A / temperature)` (Fan et al., arXiv 2502.06061).

    For a sample `x_0` and noise `eps`, `x_t = alpha_t x_0 + sigma_t eps` with t uniform (docs/math.md, eq. 23):
    a two-time map matches its diagonal `u(x_t, t, t)` to the velocity `eps - x_0` of the linear path; a single-time map
    matches `X_{t->0}(x_t)` to `x_0`.

    Departures from the paper: weights come from group advantages instead of raw rewards; no Wasserstein regulariser;
    on a two-time map only the diagonal is trained, and intervals `s < t` follow through shared weights only; a
    single-time map is trained as a denoiser, which blurs it where several samples explain one `x_t`; groups with equal
    rewards are left out.

    Batch rows, draw-major: `x_t`, `target`: (rows, *shape); `t`: (rows,); `weight`: (rows,), mean 1.
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
        flow_map = policies.current
        if flow_map.anchors == "any" and flow_map.path.name != "linear":
            raise CompositionError(
                f"The objective 'rwfm' has no velocity target on the path '{flow_map.path.name}'",
                "Use a model on the linear path.",
            )
        rollout = scored.rollout
        keep = informative(scored.advantages, rollout.groups).cpu().nonzero().squeeze(1)
        index = keep.repeat(self.config.draws)
        noise_keys = [
            NoiseKey(seed, 0, sample, draw, 0) for draw in range(self.config.draws) for sample in keep.tolist()
        ]
        x_0 = rollout.x0[index.to(rollout.x0.device)]
        eps = noise(noise_keys, x_0.shape[1:], OBJECTIVE).to(x_0.device)
        t = 1.0 - uniform([key._replace(step=1) for key in noise_keys], OBJECTIVE).to(x_0.device)
        path = flow_map.path
        x_t = expand(path.alpha(t), x_0) * x_0 + expand(path.sigma(t), x_0) * eps
        target = eps - x_0 if flow_map.anchors == "any" else x_0
        advantage = scored.advantages.to(x_0.device, torch.float32)[index.to(x_0.device)]
        weight = torch.softmax(advantage / self.config.temperature, 0) * len(index)
        rows = {"x_t": x_t, "t": t, "target": target, "weight": weight}
        return Batch(rows, rollout.cond.select(index))

    def loss(self, policies: Policies, batch: Batch) -> Loss:
        """Weighted squared error, averaged over coordinates and rows. Part `match`: the unweighted error."""
        rows = batch.rows
        predicted = _predict(policies.current, batch)
        error = (predicted.float() - rows["target"]).square().flatten(1).mean(1)
        return Loss((rows["weight"] * error).mean(), {keys.MATCH: error.detach().mean()})


def _predict(flow_map: FlowMap, batch: Batch) -> Float[Tensor, "b *shape"]:
    x_t, t = batch.rows["x_t"], batch.rows["t"]
    if flow_map.anchors == "any":
        return flow_map.velocity(x_t, t, batch.cond)
    return flow_map.jump(x_t, t, torch.zeros_like(t), batch.cond)
