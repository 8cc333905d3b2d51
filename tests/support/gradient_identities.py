"""Closed forms of reward gradients and of the last step; called like `rl_identities`.

The jumps are written out here: `X(x) = x - (t - s)(scale x + shift + 0.3 (t + s))` for the toy network.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fmg.conformance.toys import toy_images, toy_scores
from fmg.core.types import Batch, RewardOutput, SampleRollout, ScoredRollout, StateRollout
from fmg.rl import sample_rollout
from fmg.rl.configs import GrpoConfig, RewardGradientConfig
from fmg.rl.grpo import Grpo
from fmg.rl.reward_gradient import LastStep, RewardGradient, ScoredImages
from tests.support.toy import (
    GRID,
    SHAPE,
    Network,
    ToyPolicies,
    drawn,
    grouped,
    policies,
    preference,
    scored,
    single_time,
    stochasticizer,
    two_time,
)

STEPS = len(GRID) - 1
BETA = 0.4


def _case(map_name: Literal["two", "single"], **options: object) -> tuple[Network, RewardGradient, ToyPolicies, Batch]:
    """A policy that has moved from the rollout's, the base away from both, and the batch of the rollout."""
    network, flow_map = two_time() if map_name == "two" else single_time()
    views = policies(network, type(flow_map))  # type: ignore[arg-type]
    config = RewardGradientConfig(**options)  # type: ignore[arg-type]
    objective = RewardGradient(config).with_images(toy_images, toy_scores)
    cond, index = grouped(4, 6)
    starts = objective.starts(index, torch.arange(24) % 6, STEPS, seed=7, iteration=0)
    taken = sample_rollout(flow_map, cond, index, GRID, seed=7, latent_shape=SHAPE, starts=starts)
    zero = torch.zeros(24)
    batch = objective.prepare(ScoredRollout(taken, RewardOutput(zero, {}), zero), views, 3)
    if isinstance(taken, StateRollout):
        assert torch.equal(batch.rows["x_t"], taken.x_t)
        if starts is not None:
            assert torch.equal(batch.rows["times"][:, 0], torch.tensor(GRID)[starts])
    with torch.no_grad():
        network.scale += 0.1
        views.reference.network.shift -= 0.2  # type: ignore[attr-defined]
    return network, objective, views, batch


def _jump(scale: Tensor, shift: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return x - (t - s) * (scale * x + shift + 0.3 * (t + s))


def _reached(network: Network, views: ToyPolicies, batch: Batch, *, single: bool) -> tuple[Tensor, Tensor]:
    """The end of the jumps, and the mean squared distance of each from the base's, with gradients."""
    base: Network = views.reference.network  # type: ignore[attr-defined]
    x, times, distances = batch.rows["x_t"], batch.rows["times"], []
    for k in range(times.shape[1] - 1):
        t, s = (times[:, i, None, None] for i in (k, k + 1))
        to = torch.zeros_like(s) if single else s
        ours = _jump(network.scale, network.shift, x, t, to)
        distances.append((ours - _jump(base.scale, base.shift, x, t, to).detach()).square().mean())
        last = k == times.shape[1] - 2
        x = (1 - s) * ours + s * batch.rows["renoise"][:, k] if single and not last else ours
    return x, sum(distances, torch.zeros(())) / len(distances)


def check_reward_gradient_closed_form() -> None:
    """Loss and gradient of every method, with the base as a place without gradients."""
    cases: tuple[tuple[Literal["two", "single"], dict[str, object], int], ...] = (
        ("two", {"jumps": 3, "l2_beta": BETA}, 24),
        ("single", {"jumps": 3}, 24),
        ("two", {"method": "refl", "l2_beta": BETA}, 24),
        ("two", {"method": "draft-lv", "draws": 3}, 72),
    )
    for map_name, options, rows in cases:
        network, objective, views, batch = _case(map_name, **options)
        assert len(batch) == rows
        loss = objective.loss(views, batch)
        x_0, distance = _reached(network, views, batch, single=map_name == "single")
        reward = toy_scores(toy_images(x_0), batch.cond.prompts).mean()
        # not detached where a beta is set, as the base alone has no gradient
        total = float(options.get("l2_beta", 0.0)) * distance - reward  # type: ignore[arg-type]
        torch.testing.assert_close(loss.total, total)
        parameters = list(network.parameters())
        ours, theirs = (torch.autograd.grad(value, parameters) for value in (loss.total, total))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
            assert float(one.abs().max()) > 1e-3
        torch.testing.assert_close(loss.parts["gradient_reward"], reward.detach())
        if "l2_beta" in options:
            torch.testing.assert_close(loss.parts["l2_ref"], distance.detach())


def check_jumps_begin_where_the_method_says() -> None:
    """ReFL at every interval alike; DRaFT-LV at the last time before 0, on the path of its own sample."""
    _, _, _, batch = _case("two", method="draft-lv", draws=100)
    assert batch.rows["times"].tolist() == [list(GRID[-2:])] * 2400
    cond, index = grouped(4, 6)
    # the rollout of `_case`, whose network had not moved yet
    finished: SampleRollout = sample_rollout(two_time()[1], cond, index, GRID, seed=7, latent_shape=SHAPE)
    s = GRID[-2]
    eps = (batch.rows["x_t"] - (1 - s) * finished.x0.repeat(100, 1, 1)) / s
    assert len(eps.flatten().unique()) > 0.99 * eps.numel()
    torch.testing.assert_close(torch.stack([eps.mean(), eps.std()]), torch.tensor([0.0, 1.0]), atol=0.03, rtol=0)
    refl = RewardGradient(RewardGradientConfig(method="refl"))
    starts = refl.starts(torch.arange(400), torch.zeros(400, dtype=torch.int64), STEPS, seed=0, iteration=0)
    assert starts is not None
    assert torch.bincount(starts, minlength=STEPS).min() > 70


def check_last_step_closed_form() -> None:
    """The loss beside it less the weighted reward after one jump, with every sample equally often."""
    network = two_time()[0]
    views = policies(network)
    state = drawn(views.current)
    inner = Grpo(GrpoConfig(clip_range=0.1)).bind(stochasticizer())
    both = LastStep(inner, 0.5, ScoredImages(toy_images, toy_scores))
    rollout = scored(state, preference(state))
    alone, paired = inner.prepare(rollout, views, 3), both.prepare(rollout, views, 3)
    beside: Batch = paired.beside  # type: ignore[attr-defined]
    assert len(alone) == len(paired) == len(beside) == 3 * 24
    rows = beside.rows
    assert rows["times"].tolist() == [list(GRID[-2:])] * len(beside)
    s = GRID[-2]
    eps = (rows["x_t"] - (1 - s) * state.x0.repeat_interleave(3, 0)) / s
    assert 0.8 < float(eps.std()) < 1.2
    zero = torch.zeros(())
    x_0 = _jump(network.scale, network.shift, rows["x_t"], zero + s, zero)
    reward = toy_scores(toy_images(x_0), beside.cond.prompts).mean()
    parameters = list(network.parameters())
    ours = both.loss(views, paired)
    theirs = inner.loss(views, alone).total - 0.5 * reward
    torch.testing.assert_close(ours.total, theirs)
    for one, other in zip(
        torch.autograd.grad(ours.total, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(ours.parts["last_step_reward"], reward.detach())
