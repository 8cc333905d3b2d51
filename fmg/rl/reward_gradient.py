"""Gradients of differentiable rewards through the last jumps of a few-step map and its decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fmg.core import metric_keys as keys
from fmg.core.errors import CompositionError
from fmg.core.protocols import DecodeFunction, FlowMap, Needs, Objective, Policies, ScoreFunction, Stochasticizer
from fmg.core.types import Batch, Loss, SampleRollout, ScoredRollout, StateRollout
from fmg.flow.path import renoised
from fmg.rl.configs import RewardGradientConfig
from fmg.rl.keyed_noise import OBJECTIVE, NoiseKey
from fmg.rl.rollouts import noise, sample_keys, uniform

# The step of the noise keys that choose where ReFL starts; no grid is as long.
_CHOICE = 1_000_000


class RewardGradient:
    """`L = -mean r(D(x_0), prompt)`, where `x_0` is reached from a stored state by jumps that record gradients.

    `method` (docs/math.md, eq. 35):
        `draft`: the last `jumps` intervals of the sampler, from the rollout's own state: DRaFT-K (Clark et al., arXiv
            2309.17400). With as many jumps as the rollout has steps it is DRaFT, through the whole chain from noise.
        `draft-lv`: one jump from each of `draws` re-noisings of the finished sample to the last time of the grid.
        `refl`: one jump to 0 from the rollout's state at a random time of the grid (ReFL, Xu et al., arXiv 2304.05977).

    Images are not compared: a group is the images of one prompt, and its size has no part in the loss of an image.
    `l2_beta` pulls each jump towards the base's jump from the same state, which has no gradient.

    Departures from the papers: a jump of a flow map takes the place of a step of a diffusion sampler. States come from
    the policy that generated the rollout, so later updates of an iteration start from slightly older ones. ReFL
    maximises the reward itself, without the ReLU around it and without the pretraining loss; DRaFT-LV re-noises on the
    map's own path. Between the jumps of a single-time map the noise is not that of the rollout.

    Batch rows: `x_t`: (rows, *shape), where the jumps begin; `times`: (rows, jumps + 1), decreasing to 0; for several
    jumps of a single-time map `renoise`: (rows, jumps - 1, *shape).
    """

    needs: Literal["gradients"] = "gradients"
    clip_range: None = None

    def __init__(self, config: RewardGradientConfig, images: ScoredImages | None = None) -> None:
        self.config = config
        self._images = images or ScoredImages(_no_decoder, _no_rewards, checkpointing=False)

    def bind(self, stochasticizer: Stochasticizer) -> RewardGradient:
        """Returns itself: no density is needed."""
        return self

    def with_images(self, decode: DecodeFunction, score: ScoreFunction) -> RewardGradient:
        """The same objective with a decoder and the rewards."""
        return RewardGradient(self.config, ScoredImages(decode, score, self.config.checkpointing))

    def starts(
        self, groups: Int[Tensor, " n"], members: Int[Tensor, " n"], steps: int, *, seed: int, iteration: int
    ) -> Int[Tensor, " n"] | None:
        """The interval at which the jumps of each sample begin; None for `draft-lv`."""
        if self.config.method == "draft-lv":
            return None
        if self.config.method == "draft":
            return torch.full((len(groups),), steps - self.config.jumps)
        keys = [key._replace(step=_CHOICE) for key in sample_keys(groups, seed, iteration, members)]
        return (uniform(keys) * steps).long().clamp(max=steps - 1)

    def prepare(self, scored: ScoredRollout, policies: Policies, seed: int) -> Batch:
        """One row for each sample; with `draft-lv` one for each of its re-noisings.

        Raises:
            CompositionError: the rollout has no states.
        """
        rollout, flow_map = scored.rollout, policies.current
        if self.config.method == "draft-lv":
            index = torch.arange(len(rollout.x0)).repeat(self.config.draws)
            return last_jumps(rollout, flow_map, index, seed)
        if not isinstance(rollout, StateRollout):
            raise CompositionError(
                "The objective 'reward-gradient' got a rollout without states",
                "Give `sample_rollout` the argument `starts`, or set objective.method to draft-lv.",
            )
        grid, rows = torch.tensor(rollout.grid, device=rollout.x0.device), len(rollout.x0)
        if self.config.method == "refl":
            first = grid[rollout.start.to(grid.device)]
            times = torch.stack([first, torch.zeros_like(first)], 1)
        else:
            times = grid[-self.config.jumps - 1 :].expand(rows, -1)
        columns = {"x_t": rollout.x_t, "times": times}
        if flow_map.anchors == "endpoint" and times.shape[1] > 2:
            shape = rollout.x0.shape[1:]
            drawn = [_noise(range(rows), seed, step, shape, grid.device) for step in range(1, times.shape[1] - 1)]
            columns["renoise"] = torch.stack(drawn, 1)
        return Batch(columns, rollout.cond)

    def loss(self, policies: Policies, batch: Batch) -> Loss:
        """Minus the mean reward. Parts: `gradient_reward`, the mean reward; with `l2_beta > 0` also `l2_ref`."""
        beta = self.config.l2_beta
        x_0, distance = self._images.reached(policies, batch, compare=beta > 0)
        reward = self._images.rewards(x_0, batch.cond.prompts).mean()
        parts = {keys.GRADIENT_REWARD: reward.detach()}
        if distance is None:
            return Loss(-reward, parts)
        return Loss(beta * distance - reward, {**parts, keys.L2_REF: distance.detach()})


class LastStep:
    """Another objective plus the gradient of rewards through the last jump (docs/math.md, eq. 36; RTDMD's last step).

    `L = L_inner - weight mean r(D(X_{t->0}(x_t)), prompt)`: `x_t` is a sample of the rollout, re-noised to the last
    time of the grid before 0 as in DRaFT-LV, so rollouts of any kind work. Each row of the inner batch is paired
    with one such state; they are spread evenly over the samples.

    Parts: those of the inner objective, and `last_step_reward`, the mean reward of these jumps.
    """

    def __init__(self, inner: Objective, weight: float, images: ScoredImages) -> None:
        self._inner = inner
        self._weight = weight
        self._images = images

    @property
    def needs(self) -> Needs:
        return self._inner.needs

    @property
    def clip_range(self) -> float | None:
        return self._inner.clip_range

    def bind(self, stochasticizer: Stochasticizer) -> LastStep:
        return LastStep(self._inner.bind(stochasticizer), self._weight, self._images)

    def prepare(self, scored: ScoredRollout, policies: Policies, seed: int) -> Batch:
        batch, samples = self._inner.prepare(scored, policies, seed), len(scored.rollout.x0)
        index = torch.arange(len(batch)) * samples // max(1, len(batch))
        return PairedBatch(batch.rows, batch.cond, last_jumps(scored.rollout, policies.current, index, seed))

    def loss(self, policies: Policies, batch: Batch) -> Loss:
        assert isinstance(batch, PairedBatch)
        inner = self._inner.loss(policies, batch)
        x_0, _ = self._images.reached(policies, batch.beside)
        reward = self._images.rewards(x_0, batch.beside.cond.prompts).mean()
        return Loss(inner.total - self._weight * reward, {**inner.parts, keys.LAST_STEP_REWARD: reward.detach()})


@dataclass(frozen=True)
class PairedBatch(Batch):
    """A batch, and one of equally many rows for a second loss, with a conditioning of its own."""

    beside: Batch

    def select(self, index: Int[Tensor, " k"]) -> PairedBatch:
        """The given rows of both, in the given order."""
        chosen = super().select(index)
        return PairedBatch(chosen.rows, chosen.cond, self.beside.select(index))


@dataclass(frozen=True)
class ScoredImages:
    """Where a policy's jumps lead, and the rewards of the images there, all with gradients.

    Attributes:
        decode: images of latents.
        score: rewards of images.
        checkpointing: whether the activations of each jump, of the decoder and of the rewards are computed again in the
            backward pass, so that only those of one of them are in memory at a time; None: on a GPU.
    """

    decode: DecodeFunction
    score: ScoreFunction
    checkpointing: bool | None = None

    def reached(
        self, policies: Policies, batch: Batch, *, compare: bool = False
    ) -> tuple[Float[Tensor, "b *shape"], Float[Tensor, ""] | None]:
        """The end of the jumps of `batch`. With `compare`, also their mean squared distance to those of the base."""
        flow_map, cond, times = policies.current, batch.cond, batch.rows["times"]
        x, distances = batch.rows["x_t"], []
        for k in range(times.shape[1] - 1):
            t, s = times[:, k], times[:, k + 1]
            inner = "renoise" in batch.rows and k < times.shape[1] - 2
            target = torch.zeros_like(s) if inner else s
            reached = self._pass(flow_map.jump, x, t, target, cond)
            if compare:
                with torch.no_grad():
                    base = policies.reference.jump(x, t, target, cond)
                distances.append((reached - base).square().mean())
            x = renoised(flow_map.path, reached, s, batch.rows["renoise"][:, k]) if inner else reached
        return x, torch.stack(distances).mean() if compare else None

    def rewards(self, x_0: Float[Tensor, "b *shape"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """The rewards of the decoded images."""
        images = self._pass(self.decode, x_0)
        scores: Tensor = self._pass(self.score, images, prompts)
        return scores.to(x_0.device)

    def _pass(self, function: Callable[..., Tensor], x: Tensor, *arguments: object) -> Tensor:
        wanted = x.is_cuda if self.checkpointing is None else self.checkpointing
        if not (wanted and torch.is_grad_enabled()):
            return function(x, *arguments)
        # an early stop is an exception, which the checks around a reward would take for the reward's own
        with set_checkpoint_early_stop(False):
            computed: Tensor = checkpoint(function, x, *arguments, use_reentrant=False)
        return computed


def last_jumps(rollout: SampleRollout, flow_map: FlowMap, index: Int[Tensor, " k"], seed: int) -> Batch:
    """Rows that jump from the last time of the grid to 0: the samples `index`, noised up to it anew."""
    x_0 = rollout.x0[index.to(rollout.x0.device)]
    times = torch.tensor(rollout.grid[-2:], device=x_0.device).expand(len(index), -1)
    x_t = renoised(flow_map.path, x_0, times[:, 0], _noise(range(len(index)), seed, 0, x_0.shape[1:], x_0.device))
    return Batch({"x_t": x_t, "times": times}, rollout.cond.select(index))


def _noise(rows: Sequence[int], seed: int, step: int, shape: Sequence[int], device: torch.device) -> Tensor:
    # groups of a run are never negative, so no other objective uses these keys
    return noise([NoiseKey(seed, 0, -1, row, step) for row in rows], shape, OBJECTIVE).to(device)


def _no_decoder(latents: Tensor) -> Tensor:
    raise CompositionError(
        "The objective 'reward-gradient' has no decoder", "Call its method `with_images` before `loss`."
    )


def _no_rewards(images: Tensor, prompts: Sequence[str]) -> Tensor:
    raise CompositionError("The objective 'reward-gradient' has no rewards", "Call its method `with_images` first.")
