"""The samples of an iteration: each process draws and scores its share, and all hold the whole.

With the whole rollout in every process, advantages, the random parts of the updates and whatever an objective prepares
are computed from the same numbers as in one process, and every update can be shared out evenly (ADR 6).
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import RewardError
from fmg.core.types import (
    Conditioning,
    PartialRewardOutput,
    RewardOutput,
    Rollout,
    SampleRollout,
    Transition,
    TransitionRollout,
)
from fmg.rl import rollout, sample_rollout, window_steps
from fmg.rl.rollouts import group_members
from fmg.training.compose import Composed
from fmg.training.processes import Processes
from fmg.training.prompts import iteration_prompts
from fmg.training.sizes import Sizes


def draw_samples(
    composed: Composed, sizes: Sizes, processes: Processes, iteration: int
) -> tuple[SampleRollout, Rollout]:
    """This process's share of an iteration's samples, and all of them; the same object for one process."""
    recipe, model = composed.recipe, composed.model
    shape = recipe.rollout
    prompts = iteration_prompts(composed.prompts, shape.groups, iteration, recipe.train.seed)
    groups = torch.arange(shape.groups).repeat_interleave(shape.group_size)
    cond: Conditioning = model.encode([p.text for p in prompts]).select(groups)
    rows = processes.share(len(groups), sizes.rollout_batch).rows
    own_cond = processes.own(cond, sizes.rollout_batch)
    own = _draw(composed, sizes, iteration, own_cond, groups[rows], group_members(groups)[rows])
    if processes.alone:
        return own, own
    # the transitions of the share are part of the whole, and large
    return SampleRollout(own.cond, own.groups, own.x0, own.grid), _gathered(own, cond, groups, processes, sizes)


@torch.no_grad()
def decode_samples(composed: Composed, sizes: Sizes, drawn: SampleRollout) -> Float[Tensor, "n 3 h w"]:
    """Images of samples, a few at a time."""
    chunks = torch.split(drawn.x0, sizes.rollout_batch)
    return torch.cat([composed.model.decode(chunk) for chunk in chunks])


def score_samples(
    composed: Composed,
    sizes: Sizes,
    processes: Processes,
    own: SampleRollout,
    images: Float[Tensor, "n 3 h w"],
    total: int,
) -> RewardOutput:
    """The scores of all `total` samples of an iteration, of which `images` are this process's.

    Raises:
        RewardError: a reward failed in some process; every process raises it.
    """
    scores = processes.together(lambda: composed.reward(images, own.cond.prompts))
    if processes.alone:
        return scores
    names = processes.texts("\n".join(scores.parts))
    if len(set(names)) > 1:
        raise RewardError(
            "A reward reports other parts in one process than in another", "Return the same parts for every batch."
        )
    scored = scores.scored if isinstance(scores, PartialRewardOutput) else torch.ones(len(images), dtype=torch.bool)

    def gathered(values: Tensor) -> Tensor:
        return processes.gather(values, total, sizes.rollout_batch)

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


def _gathered(own: Rollout, cond: Conditioning, groups: Tensor, processes: Processes, sizes: Sizes) -> Rollout:
    def gathered(values: Tensor) -> Tensor:
        return processes.gather(values, len(groups), sizes.rollout_batch)

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
