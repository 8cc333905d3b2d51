"""Gradients of rewards through jumps and decoder: against finite differences, and what belongs to each method."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
import torch

from fmg.conformance.toys import GRID, SHAPE, Network, ToyPolicies, network_map, policies, scored_rollout, unconditional
from fmg.conformance.toys import toy_images as decode
from fmg.conformance.toys import toy_scores as score
from fmg.core.errors import CompositionError
from fmg.core.types import Batch, Conditioning, RewardOutput, ScoredRollout
from fmg.flow.sampling import native_sample
from fmg.recipe import Recipe
from fmg.registry import objectives, stochasticizers
from fmg.rl import sample_rollout
from fmg.rl.configs import GrpoConfig, RewardGradientConfig
from fmg.rl.grpo import Grpo
from fmg.rl.reward_gradient import LastStep, RewardGradient, ScoredImages, last_jumps
from fmg.training.compose import compose
from fmg.training.distributed import DistContext
from fmg.training.launch import Sizes
from fmg.training.samples import Sampler

ROWS = 6
STEPS = len(GRID) - 1


def double(anchors: Literal["endpoint", "any"] = "any") -> tuple[Network, ToyPolicies]:
    """A network in fp64 beside a base that differs from it."""
    (network, current), (base, reference) = (network_map(anchors, "linear") for _ in range(2))
    network.double()
    base.double().scale.data *= 0.9
    return network, ToyPolicies(current, reference, reference)


def prepared(objective: RewardGradient, views: ToyPolicies, seed: int = 3) -> Batch:
    """The batch of a rollout that keeps the states which the objective asks for."""
    index = torch.arange(2).repeat_interleave(ROWS // 2)
    starts = objective.starts(index, torch.arange(ROWS) % 3, STEPS, seed=7, iteration=1)
    cond = Conditioning(tuple(f"prompt {i}" for i in range(ROWS)), {})
    drawn = sample_rollout(views.current, cond, index, GRID, seed=7, iteration=1, latent_shape=SHAPE, starts=starts)
    zero = torch.zeros(ROWS)
    return objective.prepare(ScoredRollout(drawn, RewardOutput(zero, {}), zero), views, seed)


def made(**options: object) -> RewardGradient:
    return RewardGradient(RewardGradientConfig(**options)).with_images(decode, score)  # type: ignore[arg-type]


CASES: dict[str, tuple[dict[str, object], Literal["endpoint", "any"]]] = {
    "draft-1": ({"l2_beta": 0.3}, "any"),
    "draft, whole chain": ({"jumps": STEPS}, "any"),
    "draft-3, single time": ({"jumps": 3}, "endpoint"),
    "draft-lv": ({"method": "draft-lv", "draws": 3}, "any"),
    "refl": ({"method": "refl", "l2_beta": 0.3}, "any"),
    "refl, single time": ({"method": "refl"}, "endpoint"),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_finite_differences(case: str) -> None:
    options, anchors = CASES[case]
    network, views = double(anchors)
    objective = made(**options, checkpointing=True)
    batch = prepared(objective, views)
    gradients = torch.autograd.grad(objective.loss(views, batch).total, list(network.parameters()))
    plain = made(**options)
    without = torch.autograd.grad(plain.loss(views, batch).total, list(network.parameters()))
    for parameter, gradient, same in zip(network.parameters(), gradients, without, strict=True):
        # recomputing activations changes nothing
        assert torch.equal(gradient, same)
        numeric = torch.empty_like(gradient)
        for place in range(parameter.numel()):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter.view(-1)[place] += step
                    values.append(float(plain.loss(views, batch).total))
                    parameter.view(-1)[place] -= step
            numeric.view(-1)[place] = (values[0] - values[1]) / 2e-5
        assert float(gradient.abs().max()) > 1e-3
        torch.testing.assert_close(gradient, numeric, rtol=1e-7, atol=1e-9)


def test_the_whole_chain_ends_where_the_sampler_does_and_the_loss_is_minus_the_reward() -> None:
    _, views = double()
    objective = made(jumps=STEPS, l2_beta=0.5)
    batch = prepared(objective, views)
    assert batch.rows["times"].tolist() == [list(GRID)] * ROWS
    x_0 = native_sample(views.current, batch.cond, batch.rows["x_t"].double(), GRID, lambda k: torch.empty(0))
    base = native_sample(views.reference, batch.cond, batch.rows["x_t"].double(), GRID, lambda k: torch.empty(0))
    loss = objective.loss(views, batch)
    reward = score(decode(x_0), batch.cond.prompts).mean()
    assert float(loss.parts["gradient_reward"]) == pytest.approx(float(reward.detach()), rel=1e-12)
    assert float(loss.total.detach()) == pytest.approx(float(0.5 * loss.parts["l2_ref"] - reward.detach()), rel=1e-12)
    assert float(loss.parts["l2_ref"]) > 0
    assert not torch.allclose(base, x_0)


def test_states_are_those_of_the_rollout_and_refl_starts_anywhere() -> None:
    _, views = double()
    last = prepared(made(), views).rows
    assert last["times"].tolist() == [[GRID[-2], 0.0]] * ROWS
    whole = prepared(made(jumps=STEPS), views).rows
    state = whole["x_t"]
    for t, s in pairwise(GRID[:-1]):
        state = views.current.jump(state, torch.full((ROWS,), t), torch.full((ROWS,), s), unconditional(ROWS))
    torch.testing.assert_close(last["x_t"], state.float())
    objective = made(method="refl")
    groups, members = torch.arange(200), torch.zeros(200, dtype=torch.int64)
    starts = objective.starts(groups, members, STEPS, seed=0, iteration=0)
    assert starts is not None
    assert torch.bincount(starts, minlength=STEPS).min() > 30
    # a share of the samples starts where it does in the whole
    part = objective.starts(groups[50:60], members[50:60], STEPS, seed=0, iteration=0)
    assert part is not None
    assert torch.equal(part, starts[50:60])
    assert objective.starts(groups, members, STEPS, seed=0, iteration=1).tolist() != starts.tolist()  # type: ignore[union-attr]


def test_a_last_step_adds_its_gradient_to_any_objective_and_keeps_its_rows() -> None:
    network, views = policies()
    scored = scored_rollout(views.current)
    grpo = Grpo(GrpoConfig()).bind(stochasticizers.build("asfmc", {"ratio": 0.5}))
    both = LastStep(grpo, 0.5, ScoredImages(decode, score))
    alone, paired = grpo.prepare(scored, views, 3), both.prepare(scored, views, 3)
    assert alone.rows.keys() == paired.rows.keys()
    assert all(torch.equal(alone.rows[name], paired.rows[name]) for name in alone.rows)
    # every sample has its share of the rows
    samples = len(scored.rollout.x0)
    index = torch.arange(len(alone)) * samples // len(alone)
    assert torch.bincount(index).tolist() == [STEPS - 1] * samples
    beside = last_jumps(scored.rollout, views.current, index, 3)
    zero = torch.zeros(len(beside))
    reached = views.current.jump(beside.rows["x_t"], zero + GRID[-2], zero, beside.cond)
    reward = score(decode(reached), beside.cond.prompts).mean()
    loss, parameters = both.loss(views, paired), list(network.parameters())
    ours = torch.autograd.grad(loss.total, parameters)
    theirs = torch.autograd.grad(grpo.loss(views, alone).total - 0.5 * reward, parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert float(loss.parts["last_step_reward"]) == pytest.approx(float(reward.detach()), rel=1e-5)
    parts = torch.stack([len(part) * both.loss(views, part).total.detach() for part in paired.split(7)]).sum()
    torch.testing.assert_close(parts / len(paired), loss.total.detach())


def test_rollouts_without_states_and_options_of_advantages_are_refused() -> None:
    _, views = policies()
    with pytest.raises(CompositionError, match="without states"):
        made().prepare(scored_rollout(views.current), views, 0)
    assert len(made(method="draft-lv").prepare(scored_rollout(views.current), views, 0)) == 48
    with pytest.raises(CompositionError, match="no decoder"):
        objectives.build("reward-gradient").loss(views, prepared(made(), views))
    with pytest.raises(ValueError, match="global_std concerns advantages"):
        RewardGradientConfig(global_std=False)


@pytest.mark.parametrize("options", [{"jumps": 4}, {"method": "refl"}])
def test_the_gradient_of_the_embedded_model_is_that_of_finite_differences(options: dict[str, object]) -> None:
    """Along it and along a random direction, with fp64 weights. The decoder has kinks, and its images are fp32."""
    chosen = {"objective": {"name": "reward-gradient", **options}, "rewards": ["shapes-clip"], "rollout.kind": "chain"}
    recipe = Recipe.default(None, **chosen, **{"rollout.groups": 2, "rollout.group_size": 2})
    composed = compose(recipe, torch.device("cpu"), torch.float64)
    sampler = Sampler(composed, Sizes(4, 4), DistContext())
    model, (_, rollout) = composed.model, sampler.sample(0)
    zero = torch.zeros(len(rollout.x0))
    batch = composed.objective.prepare(ScoredRollout(rollout, RewardOutput(zero, {}), zero), model.policies, 0)
    parameters = [parameter for _, parameter in model.trainable()]
    gradients = torch.autograd.grad(composed.objective.loss(model.policies, batch).total, parameters)
    generator = torch.Generator().manual_seed(0)
    for directions in (gradients, [torch.randn(g.shape, generator=generator) for g in gradients]):
        length = torch.stack([d.double().square().sum() for d in directions]).sum().sqrt()
        slope = sum(float((g.double() * d.double()).sum() / length) for g, d in zip(gradients, directions, strict=True))
        losses = []
        for step in (1e-4, -2e-4):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += step * direction / length
                losses.append(float(composed.objective.loss(model.policies, batch).total))
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += 1e-4 * direction / length
        size = float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
        assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(slope, rel=0.01, abs=0.01 * size)
