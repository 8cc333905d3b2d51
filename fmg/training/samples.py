"""The samples of an iteration: each process draws and scores its share, and all hold the whole.

With the whole rollout in every process, advantages, the random parts of the updates and whatever an objective prepares
are computed from the same numbers as in one process, and every update can be shared out evenly (ADR 6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fmg.core import metric_keys as keys
from fmg.core.errors import RewardError
from fmg.core.events import Notice, Observer, ignore
from fmg.core.protocols import FlowMap
from fmg.core.types import (
    BranchRollout,
    Conditioning,
    PartialRewardOutput,
    Prompt,
    RewardOutput,
    Rollout,
    SampleRollout,
    Transition,
    TransitionRollout,
)
from fmg.rl import rollout, sample_rollout, window_steps
from fmg.rl.branches import (
    Branching,
    Completion,
    StepChooser,
    branch_rollout,
    reward_spread,
    siblings_of,
    within_correlation,
)
from fmg.rl.rollouts import group_members
from fmg.training.completing import Completer, completions_gate, open_completer
from fmg.training.compose import Composed
from fmg.training.distributed import DistContext
from fmg.training.launch import Sizes
from fmg.training.plan_time import rollout_nfe
from fmg.training.prompts import DynamicPrompts, iteration_prompts

AGREEMENT_GROUPS = 6
"""Groups that are completed both ways where the agreement of completions is measured."""
CHECKED_ROLLOUTS = 2
"""Rollouts of a process of which some groups are completed by torch as well: a fresh LoRA adds exactly nothing, so
that what a backend makes of it shows only after the first update."""
CHECKED_IMAGES = 128
"""Images that are compared then, at least where a rollout has as many: one in hundreds amplifies rounding."""


@dataclass
class Sampler:
    """Generates the samples of each iteration, and learns from their rewards where to sample next.

    Attributes:
        composed: the live parts of the run.
        sizes: samples a network call.
        dist: those that share the samples.
        observer: hears whether another backend completes as torch does.
    """

    composed: Composed
    sizes: Sizes
    dist: DistContext
    observer: Observer = ignore
    _steps: StepChooser | None = field(default=None, init=False)
    _prompts: DynamicPrompts | None = field(default=None, init=False)
    _chosen: list[int] = field(default_factory=list, init=False)
    _last: tuple[Conditioning, Int[Tensor, " g"]] | None = field(default=None, init=False)
    _completer: Completer | None = field(default=None, init=False)
    _checked: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        shape, seed = self.composed.recipe.rollout, self.composed.recipe.train.seed
        if shape.kind == "branch":
            self._steps = StepChooser(shape.branch.steps, shape.steps - 1, shape.branch.floor, seed)
            self._completer = open_completer(self.composed, self._completed_at_once, self.dist)
        if shape.prompt_sampling == "dynamic":
            self._prompts = DynamicPrompts(self.composed.prompts, shape.prompt_floor, seed)

    @property
    def unit(self) -> int:
        """Samples that go through the network together, of which a process takes whole ones: `DistContext.shard_of`."""
        return self._unit_groups * self.composed.recipe.rollout.group_size if self._steps else self.sizes.rollout_batch

    @property
    def _completed_at_once(self) -> int:
        """Siblings that are completed in one call, at most."""
        return min(self.unit, self.sizes.rollout_batch, self.composed.recipe.rollout.samples)

    @property
    def _unit_groups(self) -> int:
        return max(1, self.sizes.rollout_batch // self.composed.recipe.rollout.group_size)

    def sample(self, iteration: int) -> tuple[SampleRollout, Rollout]:
        """This process's share of an iteration's samples, and all of them; the same object for one process."""
        shape = self.composed.recipe.rollout
        cond = self.composed.model.encode([prompt.text for prompt in self._prompts_of(iteration)])
        return self._branches(cond, iteration) if self._steps else self._chains(cond, shape.group_size, iteration)

    def learn(self, whole: Rollout, rewards: RewardOutput) -> dict[str, float]:
        """Takes the rewards of an iteration's samples; returns what is worth logging of them."""
        steps = whole.step.tolist() if isinstance(whole, BranchRollout) else None
        metrics = {keys.ROLLOUT_NFE: float(rollout_nfe(self.composed.recipe, steps))}
        if isinstance(whole, BranchRollout) and self._steps is not None:
            spread, equal = reward_spread(rewards.total, whole.step)
            self._steps.learn(spread)
            metrics |= {keys.STEP_REWARD_STD.format(k): value for k, value in spread.items()}
            metrics |= {keys.STEP_ZERO_STD_RATIO.format(k): value for k, value in equal.items()}
            metrics |= {keys.STEP_GROUPS.format(k): float((whole.step == k).sum()) for k in spread}
        if self._prompts is not None:
            values = rewards.total.double().reshape(len(self._chosen), -1)
            # a group with an image that has no score says nothing
            teaches = ~(values.amax(1) == values.amin(1))
            self._prompts.learn(self._chosen, teaches.tolist())
            metrics["prompts/mean_weight"] = float(self._prompts.weights.mean())
        return metrics

    def compares_completions(self, iteration: int) -> bool:
        """Whether an iteration of a branched run measures the agreement: each that `eval.every` divides."""
        return self._steps is not None and iteration % self.composed.recipe.eval.every == 0

    @torch.no_grad()
    def completion_agreement(self, iteration: int, rewards: RewardOutput) -> dict[str, float]:
        """How far the rewards of the two completions agree, for an iteration of which `compares_completions` is true.

        A few groups are completed the other way. `branch/completion_agreement` is the correlation of both rewards
        within groups: near 1 a jump ranks siblings as the sampler of deployment would, at a fraction of its cost.
        """
        recipe = self.composed.recipe
        shape = recipe.rollout
        assert self._last is not None
        cond, steps = self._last
        groups = torch.arange(min(AGREEMENT_GROUPS, shape.groups))
        other: Completion = "grid" if shape.branch.completion == "jump" else "jump"
        # all processes complete the same groups, since a spread network needs all of them
        stars = self._rolled(cond.select(groups), groups, steps[groups], iteration, other, None)
        images = decode_samples(self.composed, self.sizes, stars)
        again = self.dist.run_on_all(lambda: self.composed.reward(images, stars.cond.prompts)).total
        agreement = within_correlation(rewards.total[: len(again)], again, shape.group_size)
        return {} if agreement is None else {keys.COMPLETION_AGREEMENT: agreement}

    def state(self) -> dict[str, Any]:
        """What `restore` needs to sample as this object would."""
        return {
            "steps": self._steps.state() if self._steps else None,
            "prompts": torch.from_numpy(self._prompts.weights.copy()) if self._prompts else None,
        }

    def restore(self, state: Mapping[str, Any], *, same_prompts: bool = True) -> None:
        """Puts back what `state` gave; what was learned of prompts belongs to the same prompts alone."""
        if self._steps is not None:
            self._steps.restore(state["steps"])
        if self._prompts is not None and same_prompts:
            self._prompts.weights = state["prompts"].numpy().copy()

    def _prompts_of(self, iteration: int) -> list[Prompt]:
        groups, seed = self.composed.recipe.rollout.groups, self.composed.recipe.train.seed
        if self._prompts is None:
            return iteration_prompts(self.composed.prompts, groups, iteration, seed)
        self._chosen = self._prompts.choose(iteration, groups)
        return [self.composed.prompts[i] for i in self._chosen]

    def _branches(self, cond: Conditioning, iteration: int) -> tuple[SampleRollout, Rollout]:
        dist, shape, unit = self.dist, self.composed.recipe.rollout, self._unit_groups
        assert self._steps is not None
        steps = self._steps.choose(iteration, shape.groups)
        self._last = cond, steps
        rows = dist.shard_of(shape.groups, unit).rows
        span = (int(steps.min()), int(steps.max())) if dist.is_distributed else None
        groups = torch.arange(shape.groups)[rows]
        if self._completer is not None:
            self._completer.refresh()
            if self._checked < CHECKED_ROLLOUTS:
                self.dist.run_on_all(lambda: self._check(cond, steps, iteration))
                self._checked += 1
        own = self._rolled(dist.shard(cond, unit), groups, steps[rows], iteration, shape.branch.completion, span)
        if not dist.is_distributed:
            return own, own

        def gathered(values: Tensor) -> Tensor:
            return dist.gather(values, shape.groups, unit)

        by_group = {name: gathered(getattr(own, name)) for name in ("t", "s", "x_t", "mean", "std", "x_s", "log_prob")}
        whole = BranchRollout(
            cond=siblings_of(cond, shape.group_size).to(own.x0.device),
            groups=torch.arange(shape.groups).repeat_interleave(shape.group_size),
            x0=dist.gather(own.x0, shape.samples, self.unit),
            grid=own.grid,
            step=steps,
            **by_group,
        )
        return SampleRollout(own.cond, own.groups, own.x0, own.grid), whole

    def _check(self, cond: Conditioning, steps: Int[Tensor, " g"], iteration: int) -> None:
        """Completes a few groups of an iteration by the backend and by torch, and compares their images."""
        shape, flow_map = self.composed.recipe.rollout, self.composed.model.flow_map
        groups = torch.arange(min(-(-CHECKED_IMAGES // shape.group_size), shape.groups))
        completion, chosen = shape.branch.completion, cond.select(groups)
        assert self._completer is not None
        ours, torchs = (
            decode_samples(
                self.composed,
                self.sizes,
                self._rolled(chosen, groups, steps[groups], iteration, completion, None, completing),
            )
            for completing in (self._completer.flow_map, flow_map)
        )
        error = completions_gate(ours, torchs, self.composed.recipe)
        if self._checked + 1 == CHECKED_ROLLOUTS:
            text = f"Completions by {shape.branch.backend} checked twice: images within {error:.1e} of torch's."
            self.observer(Notice("info", text))

    def _rolled(
        self,
        cond: Conditioning,
        groups: Int[Tensor, " g"],
        steps: Int[Tensor, " g"],
        iteration: int,
        completion: Completion,
        span: tuple[int, int] | None,
        completing: FlowMap | None = None,
    ) -> BranchRollout:
        """Groups of an iteration, completed by `completing`; None: by the backend of the recipe."""
        recipe, model = self.composed.recipe, self.composed.model
        branch = recipe.rollout.branch
        if completing is None and self._completer is not None:
            completing = self._completer.flow_map
        return branch_rollout(
            model.flow_map,
            self.composed.stochasticizer,
            cond,
            groups,
            steps,
            self.composed.grid,
            Branching(recipe.rollout.group_size, completion, branch.prefix, branch.antithetic),
            seed=recipe.train.seed,
            iteration=iteration,
            latent_shape=model.latent_shape,
            batch_size=self.sizes.rollout_batch,
            device=model.device,
            completing=completing,
            span=span,
        )

    def _chains(self, prompts: Conditioning, size: int, iteration: int) -> tuple[SampleRollout, Rollout]:
        dist, sizes = self.dist, self.sizes
        groups = torch.arange(len(prompts)).repeat_interleave(size)
        cond = prompts.select(groups)
        rows = dist.shard_of(len(groups), sizes.rollout_batch).rows
        own_cond = dist.shard(cond, sizes.rollout_batch)
        own = _draw(self.composed, sizes, iteration, own_cond, groups[rows], group_members(groups)[rows])
        if not dist.is_distributed:
            return own, own
        # the transitions of the share are part of the whole, and large
        return SampleRollout(own.cond, own.groups, own.x0, own.grid), _gathered(own, cond, groups, dist, sizes)


@torch.no_grad()
def decode_samples(composed: Composed, sizes: Sizes, drawn: SampleRollout) -> Float[Tensor, "n 3 h w"]:
    """Images of samples, a few at a time, without a second copy of them all."""
    images = torch.empty(0)
    for start in range(0, len(drawn.x0), sizes.rollout_batch):
        decoded = composed.model.decode(drawn.x0[start : start + sizes.rollout_batch])
        if not start:
            images = decoded.new_empty(len(drawn.x0), *decoded.shape[1:])
        images[start : start + len(decoded)] = decoded
    return images


def score_samples(
    composed: Composed,
    dist: DistContext,
    own: SampleRollout,
    images: Float[Tensor, "n 3 h w"],
    total: int,
    unit: int,
) -> RewardOutput:
    """The scores of all `total` samples of an iteration, of which `images` are this process's.

    `unit` is that of the sampler.

    Raises:
        RewardError: a reward failed in some process; every process raises it.
    """
    scores = dist.run_on_all(lambda: composed.reward(images, own.cond.prompts))
    if not dist.is_distributed:
        return scores
    names = dist.gather_texts("\n".join(scores.parts))
    if len(set(names)) > 1:
        raise RewardError(
            "A reward reports other parts in one process than in another", "Return the same parts for every batch."
        )
    scored = scores.scored if isinstance(scores, PartialRewardOutput) else torch.ones(len(images), dtype=torch.bool)

    def gathered(values: Tensor) -> Tensor:
        return dist.gather(values, total, unit)

    totals, known = gathered(scores.total), gathered(scored)
    parts = {name: gathered(values) for name, values in scores.parts.items()}
    return RewardOutput(totals, parts) if bool(known.all()) else PartialRewardOutput(totals, parts, known)


def _draw(
    composed: Composed, sizes: Sizes, iteration: int, cond: Conditioning, groups: Tensor, members: Tensor
) -> Rollout:
    recipe, model = composed.recipe, composed.model
    shape = recipe.rollout
    if composed.objective.needs == "transitions":
        return rollout(
            model.flow_map,
            composed.stochasticizer,
            cond,
            groups,
            composed.grid,
            seed=recipe.train.seed,
            iteration=iteration,
            latent_shape=model.latent_shape,
            same_initial_noise=shape.same_initial_noise,
            stochastic_steps=window_steps(shape.window, shape.steps, iteration=iteration, seed=recipe.train.seed),
            members=members,
            batch_size=sizes.rollout_batch,
            device=model.device,
        )
    return sample_rollout(
        model.flow_map,
        cond,
        groups,
        composed.grid,
        seed=recipe.train.seed,
        iteration=iteration,
        latent_shape=model.latent_shape,
        same_initial_noise=shape.same_initial_noise,
        members=members,
        batch_size=sizes.rollout_batch,
        device=model.device,
    )


def _gathered(own: Rollout, cond: Conditioning, groups: Tensor, dist: DistContext, sizes: Sizes) -> Rollout:
    def gathered(values: Tensor) -> Tensor:
        return dist.gather(values, len(groups), sizes.rollout_batch)

    whole = replace(own, cond=cond.to(own.x0.device), groups=groups, x0=gathered(own.x0))
    if not isinstance(whole, TransitionRollout):
        return whole
    names = [entry.name for entry in fields(Transition) if entry.name != "index"]
    return replace(
        whole,
        transitions=tuple(
            Transition(step.index, **{name: gathered(getattr(step, name)) for name in names})
            for step in whole.transitions
        ),
    )
