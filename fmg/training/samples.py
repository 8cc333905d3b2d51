"""The samples of an iteration, from prompts to advantages. Each process generates and scores its share; all get all.

With the whole rollout in every process, advantages, the random parts of the updates and whatever an objective prepares
are computed from the same numbers as in a single process, and every update can be divided evenly (ADR 6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fmg.core import metric_keys as keys
from fmg.core.errors import RewardError
from fmg.core.events import Notice, Observer, ignore
from fmg.core.protocols import FlowMap, GradientObjective, PromptSet
from fmg.core.types import (
    BranchRollout,
    Conditioning,
    PartialRewardOutput,
    Prompt,
    RewardOutput,
    Rollout,
    SampleRollout,
    StateRollout,
    Transition,
    TransitionRollout,
)
from fmg.recipe import Recipe
from fmg.rewards.base import complete_groups, select_rows
from fmg.rl import (
    combined_advantages,
    group_advantages,
    rollout,
    sample_rollout,
    shuffle_advantages,
    window_steps,
    zero_std_ratio,
)
from fmg.rl.advantages import unequal_groups
from fmg.rl.branches import (
    Branching,
    Completion,
    StepChooser,
    branch_rollout,
    reward_spread,
    siblings_of,
    within_correlation,
)
from fmg.rl.keyed_noise import sub_seed
from fmg.rl.rollouts import group_members
from fmg.training.completing import Completer, completions_gate, open_completer
from fmg.training.compose import Composed
from fmg.training.distributed import DistContext
from fmg.training.launch import Sizes
from fmg.training.plan_work import rollout_nfe

AGREEMENT_GROUPS = 6
"""Groups that are completed both ways to measure how well the completions agree."""
CHECKED_ROLLOUTS = 2
"""Rollouts of a process in which some groups are completed by torch as well. A fresh LoRA adds exactly nothing, so that
a backend's error in it shows only after the first update."""
CHECKED_IMAGES = 128
"""Images compared then, where a rollout has as many: one in hundreds amplifies rounding."""

# Keeps the draws apart from others of the same seed.
_PROMPT_STREAM = 0x70726F6D707473
# A prompt whose group had equal rewards keeps this share of its weight; every iteration restores this share of what the
# weights lack.
_KEPT, _RECOVERY = 0.5, 0.01


@dataclass
class Sampler:
    """Generates the samples of each iteration, and learns from their rewards how to sample next.

    Attributes:
        composed: the live parts of the run.
        sizes: samples of a forward pass.
        dist: the processes that share the samples.
        observer: receives whether another backend completes as torch does.
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
            at_once = min(self.unit, self.sizes.rollout_batch, shape.samples)
            self._completer = open_completer(self.composed, at_once, self.dist)
        if shape.prompt_sampling == "dynamic":
            self._prompts = DynamicPrompts(self.composed.prompts, shape.prompt_floor, seed)

    @property
    def unit(self) -> int:
        """Samples that pass through the network together, the unit of `DistContext.shard_of`."""
        return self._unit_groups * self.composed.recipe.rollout.group_size if self._steps else self.sizes.rollout_batch

    @property
    def _unit_groups(self) -> int:
        return max(1, self.sizes.rollout_batch // self.composed.recipe.rollout.group_size)

    def sample(self, iteration: int) -> tuple[SampleRollout, Rollout]:
        """This process's share of an iteration's samples, and all of them; the same object for a single process."""
        cond = self.composed.model.encode([prompt.text for prompt in self._prompts_of(iteration)])
        return self._sample_branches(cond, iteration) if self._steps else self._sample_chains(cond, iteration)

    def learn(self, whole: Rollout, rewards: RewardOutput) -> dict[str, float]:
        """Learns from the rewards of an iteration's samples; returns metrics of them."""
        steps = whole.step.tolist() if isinstance(whole, BranchRollout) else None
        metrics = {keys.ROLLOUT_NFE: float(rollout_nfe(self.composed.recipe, steps))}
        if isinstance(whole, BranchRollout) and self._steps is not None:
            spread, equal = reward_spread(rewards.total, whole.step)
            self._steps.learn(spread)
            metrics |= {keys.STEP_REWARD_STD.format(k): value for k, value in spread.items()}
            metrics |= {keys.STEP_ZERO_STD_RATIO.format(k): value for k, value in equal.items()}
            metrics |= {keys.STEP_GROUPS.format(k): float((whole.step == k).sum()) for k in spread}
        if self._prompts is not None:
            scored = rewards.total.reshape(len(self._chosen), -1).isfinite().all(1)
            self._prompts.learn(self._chosen, unequal_groups(rewards.total, whole.groups).tolist(), scored.tolist())
            metrics["prompts/mean_weight"] = float(self._prompts.weights.mean())
        return metrics

    def compares_completions(self, iteration: int) -> bool:
        """Whether an iteration measures the agreement of completions: in a branched run, every `eval.every`."""
        return self._steps is not None and iteration % self.composed.recipe.eval.every == 0

    @torch.no_grad()
    def completion_agreement(self, iteration: int, rewards: RewardOutput) -> dict[str, float]:
        """How far the rewards of the two completions agree, for an iteration that `compares_completions`.

        Completes a few groups with the other method. `branch/completion_agreement` is the correlation of both rewards
        within groups: near 1, a jump ranks siblings as the sampler used in deployment would, at a fraction of its cost.
        """
        recipe = self.composed.recipe
        shape = recipe.rollout
        assert self._last is not None
        cond, steps = self._last
        groups = torch.arange(min(AGREEMENT_GROUPS, shape.groups))
        other: Completion = "grid" if shape.branch.completion == "jump" else "jump"
        # all processes complete the same groups, since a sharded network needs all of them
        branches = self._roll_out_branches(cond.select(groups), groups, steps[groups], iteration, other, None)
        images = decode_samples(self.composed, self.sizes, branches)
        again = self.dist.run_on_all(lambda: self.composed.reward(images, branches.cond.prompts)).total
        agreement = within_correlation(rewards.total[: len(again)], again, shape.group_size)
        return {} if agreement is None else {keys.COMPLETION_AGREEMENT: agreement}

    def state(self) -> dict[str, Any]:
        """The state with which a resumed run samples as this object would."""
        return {
            "steps": self._steps.state() if self._steps else None,
            "prompts": torch.from_numpy(self._prompts.weights.copy()) if self._prompts else None,
        }

    def restore(self, state: Mapping[str, Any], *, same_prompts: bool = True) -> None:
        """Restores what `state` returned; what was learned about prompts only if they are the same."""
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

    def _sample_branches(self, cond: Conditioning, iteration: int) -> tuple[SampleRollout, Rollout]:
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
                dist.run_on_all(lambda: self._check_completions(cond, steps, iteration))
                self._checked += 1
        local = self._roll_out_branches(
            dist.shard(cond, unit), groups, steps[rows], iteration, shape.branch.completion, span
        )
        if not dist.is_distributed:
            return local, local

        def gathered(values: Tensor) -> Tensor:
            return dist.gather(values, shape.groups, unit)

        by_group = {
            name: gathered(getattr(local, name)) for name in ("t", "s", "x_t", "mean", "std", "x_s", "log_prob")
        }
        whole = BranchRollout(
            cond=siblings_of(cond, shape.group_size).to(local.x0.device),
            groups=torch.arange(shape.groups).repeat_interleave(shape.group_size),
            x0=dist.gather(local.x0, shape.samples, self.unit),
            grid=local.grid,
            step=steps,
            **by_group,
        )
        return SampleRollout(local.cond, local.groups, local.x0, local.grid), whole

    def _check_completions(self, cond: Conditioning, steps: Int[Tensor, " g"], iteration: int) -> None:
        """Completes a few groups of an iteration with the backend and with torch, and compares their images."""
        shape, flow_map = self.composed.recipe.rollout, self.composed.model.flow_map
        groups = torch.arange(min(-(-CHECKED_IMAGES // shape.group_size), shape.groups))
        completion, chosen = shape.branch.completion, cond.select(groups)
        assert self._completer is not None
        ours, torchs = (
            decode_samples(
                self.composed,
                self.sizes,
                self._roll_out_branches(chosen, groups, steps[groups], iteration, completion, None, completing),
            )
            for completing in (self._completer.flow_map, flow_map)
        )
        error = completions_gate(ours, torchs, self.composed.recipe)
        if self._checked + 1 == CHECKED_ROLLOUTS:
            text = f"Completions by {shape.branch.backend} checked twice: images within {error:.1e} of torch's."
            self.observer(Notice("info", text))

    def _roll_out_branches(
        self,
        cond: Conditioning,
        groups: Int[Tensor, " g"],
        steps: Int[Tensor, " g"],
        iteration: int,
        completion: Completion,
        span: tuple[int, int] | None,
        completing: FlowMap | None = None,
    ) -> BranchRollout:
        """Groups of an iteration, completed by `completing`, or by the recipe's backend for None."""
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

    def _sample_chains(self, prompts: Conditioning, iteration: int) -> tuple[SampleRollout, Rollout]:
        dist, unit = self.dist, self.sizes.rollout_batch
        groups = torch.arange(len(prompts)).repeat_interleave(self.composed.recipe.rollout.group_size)
        cond = prompts.select(groups)
        rows = dist.shard_of(len(groups), unit).rows
        local = self._roll_out_chains(dist.shard(cond, unit), groups[rows], group_members(groups)[rows], iteration)
        if not dist.is_distributed:
            return local, local

        def gathered(values: Tensor) -> Tensor:
            return dist.gather(values, len(groups), unit)

        whole = replace(local, cond=cond.to(local.x0.device), groups=groups, x0=gathered(local.x0))
        if isinstance(whole, StateRollout):
            whole = replace(whole, start=gathered(whole.start), x_t=gathered(whole.x_t))
        if isinstance(whole, TransitionRollout):
            names = [entry.name for entry in fields(Transition) if entry.name != "index"]
            transitions = (
                Transition(step.index, **{name: gathered(getattr(step, name)) for name in names})
                for step in whole.transitions
            )
            whole = replace(whole, transitions=tuple(transitions))
        # the transitions of the share are part of the whole, and large
        return SampleRollout(local.cond, local.groups, local.x0, local.grid), whole

    def _roll_out_chains(self, cond: Conditioning, groups: Tensor, members: Tensor, iteration: int) -> Rollout:
        recipe, model, grid = self.composed.recipe, self.composed.model, self.composed.grid
        shape, seed = recipe.rollout, recipe.train.seed
        if self.composed.objective.needs != "transitions":
            objective, starts = self.composed.objective, None
            if isinstance(objective, GradientObjective):
                starts = objective.starts(groups, members, shape.steps, seed=seed, iteration=iteration)
            return sample_rollout(
                model.flow_map,
                cond,
                groups,
                grid,
                seed=seed,
                iteration=iteration,
                latent_shape=model.latent_shape,
                same_initial_noise=shape.same_initial_noise,
                members=members,
                starts=starts,
                batch_size=self.sizes.rollout_batch,
                device=model.device,
            )
        return rollout(
            model.flow_map,
            self.composed.stochasticizer,
            cond,
            groups,
            grid,
            seed=seed,
            iteration=iteration,
            latent_shape=model.latent_shape,
            same_initial_noise=shape.same_initial_noise,
            stochastic_steps=window_steps(shape.window, shape.steps, iteration=iteration, seed=seed),
            members=members,
            batch_size=self.sizes.rollout_batch,
            device=model.device,
        )


@torch.no_grad()
def decode_samples(composed: Composed, sizes: Sizes, rollout: SampleRollout) -> Float[Tensor, "n 3 h w"]:
    """Decodes samples a few at a time, without a second copy of all images."""
    images = torch.empty(0)
    for start in range(0, len(rollout.x0), sizes.rollout_batch):
        decoded = composed.model.decode(rollout.x0[start : start + sizes.rollout_batch])
        if not start:
            images = decoded.new_empty(len(rollout.x0), *decoded.shape[1:])
        images[start : start + len(decoded)] = decoded
    return images


def score_samples(
    composed: Composed,
    dist: DistContext,
    local: SampleRollout,
    images: Float[Tensor, "n 3 h w"],
    total: int,
    unit: int,
) -> RewardOutput:
    """The scores of all `total` samples of an iteration, of which `images` are this process's; `unit` as in `Sampler`.

    Raises:
        RewardError: a reward failed in some process; every process raises it.
    """
    scores = dist.run_on_all(lambda: composed.reward(images, local.cond.prompts))
    if not dist.is_distributed:
        return scores
    names = dist.gather_texts("\n".join(scores.parts))
    if len(set(names)) > 1:
        raise RewardError(
            "A reward returns different parts in different processes", "Return the same parts for every batch."
        )
    scored = scores.scored if isinstance(scores, PartialRewardOutput) else torch.ones(len(images), dtype=torch.bool)

    def gathered(values: Tensor) -> Tensor:
        return dist.gather(values, total, unit)

    totals, known = gathered(scores.total), gathered(scored)
    parts = {name: gathered(values) for name, values in scores.parts.items()}
    return RewardOutput(totals, parts) if bool(known.all()) else PartialRewardOutput(totals, parts, known)


def advantages(rewards: RewardOutput, groups: Int[Tensor, " n"], recipe: Recipe, iteration: int) -> Float[Tensor, " n"]:
    """Group advantages as the recipe's objective requires; 0 for groups with an unscored image.

    Those of the rewards' weighted sum, or with `reward_combination: per-reward` the weighted sum of each reward's own
    (docs/math.md, eq. 19 and 29). `train.shuffle_advantages` assigns them to random samples, the null control.
    """
    kept = complete_groups(rewards, groups)
    values = torch.zeros(len(kept))
    if not bool(kept.any()):
        return values
    options, known = recipe.objective.config, select_rows(rewards, kept)
    global_std, clip_max = options.global_std, options.adv_clip_max
    if options.reward_combination == "per-reward":
        weights = {reward.label: reward.weight for reward in recipe.rewards}
        compared = combined_advantages(known.parts, weights, groups[kept], global_std=global_std, clip_max=clip_max)
    else:
        compared = group_advantages(known.total, groups[kept], global_std=global_std, clip_max=clip_max)
    if recipe.train.shuffle_advantages:
        compared = shuffle_advantages(compared, sub_seed(recipe.train.seed, iteration))
    values[kept] = compared
    return values


def reward_metrics(rewards: RewardOutput, groups: Int[Tensor, " n"]) -> dict[str, float]:
    """`reward/mean` with its spread and standard error, `reward/<name>_mean` for every part, `zero_std_ratio`.

    Groups with an unscored image are left out; `reward/dropped` is their share of the images.
    """
    kept = complete_groups(rewards, groups)
    metrics = {keys.REWARD_DROPPED: float((~kept).double().mean())} if not bool(kept.all()) else {}
    if not bool(kept.any()):
        return metrics
    known = select_rows(rewards, kept)
    total = known.total.double()
    metrics |= {
        keys.REWARD: float(total.mean()),
        keys.REWARD_STD: float(total.std()),
        keys.REWARD_SE: float(total.std() / len(total) ** 0.5),
        keys.ZERO_STD_RATIO: zero_std_ratio(known.total, groups[kept]),
    }
    for name, values in known.parts.items():
        metrics[keys.reward_part(name)] = float(values.double().mean())
    return metrics


def iteration_prompts(prompts: PromptSet, groups: int, iteration: int, seed: int) -> list[Prompt]:
    """The `groups` prompts of an iteration.

    The set is reshuffled each time it has been used up. The prompts of an iteration depend on (seed, iteration)
    alone, so a resumed or distributed run sees the same ones.
    """
    size = len(prompts)
    start = iteration * groups
    chosen = []
    orders: dict[int, list[int]] = {}
    for position in range(start, start + groups):
        lap = position // size
        if lap not in orders:
            orders[lap] = [int(i) for i in np.random.default_rng((seed, lap)).permutation(size)]
        chosen.append(prompts[orders[lap][position % size]])
    return chosen


@dataclass
class DynamicPrompts:
    """Samples prompts whose groups recently had equal rewards less often (DAPO, arXiv 2503.14476, as weights).

    DAPO generates until every group has unequal rewards; here no image is discarded, and no prompt permanently. The
    weights are part of a run's state.

    Attributes:
        prompts: the training prompts.
        floor: minimum weight; a prompt whose rewards differ has 1.
        seed: seed of the run; with the iteration it keys every draw.
    """

    prompts: PromptSet
    floor: float
    seed: int
    weights: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = np.ones(len(self.prompts))

    def choose(self, iteration: int, groups: int) -> list[int]:
        """Indices of the prompts of an iteration; none twice before all are used."""
        draw = np.random.default_rng((self.seed, iteration, _PROMPT_STREAM))
        chosen: list[int] = []
        while len(chosen) < groups:
            # weighted sampling without replacement (Efraimidis and Spirakis, 2006)
            order = np.argsort(np.log(draw.random(len(self.weights))) / self.weights)[::-1]
            chosen += [int(i) for i in order[: groups - len(chosen)]]
        return chosen

    def learn(self, chosen: Sequence[int], unequal: Sequence[bool], scored: Sequence[bool]) -> None:
        """Reweighs the chosen prompts by whether the rewards of their groups differ.

        A group with an unscored image leaves the weight of its prompt as it is.
        """
        self.weights += _RECOVERY * (1 - self.weights)
        for prompt, differ, known in zip(chosen, unequal, scored, strict=True):
            if known:
                self.weights[prompt] = 1.0 if differ else max(self.floor, _KEPT * self.weights[prompt])
