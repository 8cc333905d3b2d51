"""Closed forms of the objective's variants, one per function; called like those of `rl_identities`."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributions import Normal

from fmg.core.types import Batch, ScoredRollout
from fmg.recipe.sections import WindowSection
from fmg.registry import objectives
from fmg.rl import combined_advantages, group_advantages, rollout, window_steps
from fmg.rl.configs import GrpoConfig
from fmg.rl.grpo import Grpo, clipped_surrogate, normalised_log_ratio
from fmg.rl.keyed_noise import NoiseKey
from fmg.rl.rollouts import noise, sample_keys
from fmg.training.update import Updater
from tests.support import toy
from tests.support.toy import GRID, SHAPE, drawn, grouped, preference, scored, stochasticizer, two_time

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def _prepared(config: GrpoConfig) -> tuple[toy.Network, toy.ToyPolicies, Grpo, ScoredRollout, Batch]:
    network, flow_map = two_time()
    result = drawn(flow_map)
    views, state = toy.policies(network), scored(result, preference(result))
    objective = Grpo(config).bind(stochasticizer())
    return network, views, objective, state, objective.prepare(state, views, seed=0)


def _first_gradient(config: GrpoConfig, weight: Tensor | None = None) -> Tensor:
    network, views, objective, _, batch = _prepared(config)
    rows = batch if weight is None else batch.with_rows(weight=weight)
    objective.loss(views, rows).total.backward()  # type: ignore[no-untyped-call]
    assert network.scale.grad is not None
    return network.scale.grad


def check_ratio_norm_identity() -> None:
    """Identity 6 of theory: `std log r + mean|d mean|^2 / (2 std) = mean(xi d mean)`, whatever the std."""
    keys = [NoiseKey(5, 0, 0, member, 0) for member in range(12)]
    mean_old, xi = noise(keys, SHAPE).double(), noise(keys, SHAPE, "objective").double()
    mean = mean_old + 0.05 * noise(keys, SHAPE, "shift").double()
    expected = (xi * (mean - mean_old)).mean((1, 2))
    for value in (0.036, 0.31, 0.76):
        std = torch.full((12,), value, dtype=torch.float64)
        wide = std[:, None, None]
        x_s = mean_old + wide * xi
        log_ratio = (Normal(mean, wide).log_prob(x_s) - Normal(mean_old, wide).log_prob(x_s)).mean((1, 2))
        by_definition = std * log_ratio + (mean - mean_old).square().mean((1, 2)) / (2 * std)
        torch.testing.assert_close(by_definition, expected)
        torch.testing.assert_close(normalised_log_ratio(mean, mean_old, x_s, std).double(), expected, **CLOSE)


def check_ratio_norm_uses_the_noise_of_the_rollout() -> None:
    """After a known shift of the mean, grpo-guard's ratio is `exp(mean(xi) d mean)` of the keyed noise itself."""
    network, views, plain, state, batch = _prepared(GrpoConfig())
    guard = objectives.build("grpo-guard").bind(stochasticizer())
    with torch.no_grad():
        network.shift += 0.05
    ratios = []
    for step in state.rollout.transitions:  # type: ignore[union-attr]
        anchor = step.s.double() / 2
        moved = -0.05 * (1 - step.s) / (1 - anchor) * (step.t - anchor)
        keys = [key._replace(step=step.index + 1) for key in sample_keys(state.rollout.groups, 7, 0)]
        ratios.append((moved * noise(keys, SHAPE).double().mean((1, 2))).exp())
    ratio = torch.cat(ratios)
    parts = guard.loss(views, batch).parts
    torch.testing.assert_close(parts["ratio_mean"].double(), ratio.mean(), **CLOSE)
    torch.testing.assert_close(parts["ratio_max"].double(), ratio.max(), **CLOSE)
    assert float(plain.loss(views, batch).parts["ratio_max"].log()) > 1.5 * float(ratio.max().log())


def check_ratio_norm_scales_the_first_gradient_by_the_std() -> None:
    """Before the first update its ratios are exactly 1, and a row's gradient is the plain one times the row's std."""
    _, views, objective, _, batch = _prepared(GrpoConfig(ratio_norm=True))
    assert float(objective.loss(views, batch).parts["ratio_max"]) == 1.0
    by_weight = _first_gradient(GrpoConfig(), batch.rows["std"])
    torch.testing.assert_close(_first_gradient(GrpoConfig(ratio_norm=True)), by_weight, rtol=1e-4, atol=1e-7)


def check_noise_weights() -> None:
    """Weights follow the stds of the steps, here `s sqrt(1 - m^2)` with `m = rho(s/2) / rho(s)`, and have mean 1."""
    _, _, _, _, batch = _prepared(GrpoConfig(noise_weighting=True))
    s = torch.tensor(GRID[1:-1], dtype=torch.float64)
    share = (s / 2 / (1 - s / 2)) / (s / (1 - s))
    std = s * (1 - share.square()).sqrt()
    weight = batch.rows["weight"].double()
    torch.testing.assert_close(weight.reshape(3, -1).mean(1), std / std.mean(), **CLOSE)
    torch.testing.assert_close(weight.mean(), torch.ones((), dtype=torch.float64), **CLOSE)
    assert _prepared(GrpoConfig())[-1].rows["weight"].eq(1).all()


def check_clip_higher() -> None:
    """The clip acts on each side at its own width; the narrower one bounds the replay gate."""
    cases = (  # ratio, advantage, loss, slope of the loss in the ratio
        (1.25, 2.0, -2.5, -2.0),
        (1.40, 2.0, -2.6, 0.0),
        (0.95, -2.0, 1.9, 2.0),
        (0.85, -2.0, 1.8, 0.0),
        (0.85, 2.0, -1.7, -2.0),
    )
    for value, advantage, expected, slope in cases:
        ratio = torch.tensor([value], requires_grad=True)
        loss = clipped_surrogate(ratio, torch.tensor([advantage]), 0.1, 0.3)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert ratio.grad is not None
        torch.testing.assert_close(loss.detach(), torch.tensor([expected]))
        assert float(ratio.grad) == slope
    network, views, objective, _, batch = _prepared(GrpoConfig(clip_range=0.005, clip_range_high=0.05))
    assert objective.clip_range == 0.005
    assert Grpo(GrpoConfig(clip_range=0.05, clip_range_high=0.005)).clip_range == 0.005
    with torch.no_grad():
        network.shift += 0.05
    density = stochasticizer().transition(
        views.current, batch.rows["x_t"], batch.rows["t"], batch.rows["s"], batch.cond
    )
    ratio = (density.log_prob(batch.rows["x_s"]) - batch.rows["log_prob_old"]).exp().detach()
    outside = (ratio < 0.995) | (ratio > 1.05)
    loss = objective.loss(views, batch)
    torch.testing.assert_close(loss.parts["clip_frac"], outside.float().mean())
    assert 0 < float(outside.float().mean()) < float(((ratio - 1).abs() > 0.005).float().mean())
    advantage = batch.rows["advantage"]
    torch.testing.assert_close(
        loss.total, -torch.minimum(ratio * advantage, ratio.clamp(0.995, 1.05) * advantage).mean()
    )


def _updates(kl_limit: float | None) -> list[float]:
    network, views, objective, _, batch = _prepared(GrpoConfig(clip_range=0.5))
    parameters = list(network.parameters())
    updater = Updater(objective, views, torch.optim.SGD(parameters, lr=0.05), parameters, 1.0, 24)
    return [logged["approx_kl"] for logged in updater.updates(batch, 4, 0, kl_limit)]


def check_target_kl_stops() -> None:
    """Updates continue until the first one after which the KL exceeds the limit; that one is kept."""
    kls = _updates(None)
    assert len(kls) == 4
    # the limit itself does not count as exceeded
    for limit in (0.5 * min(kls), *kls):
        exceeded = [number for number, kl in enumerate(kls) if kl > limit]
        assert _updates(limit) == (kls[: exceeded[0] + 1] if exceeded else kls)
    assert objectives.config("grpo", {"target_kl": 1e-3}).kl_limit == 1e-3  # type: ignore[attr-defined]
    assert objectives.config("grpo").kl_limit is None  # type: ignore[attr-defined]
    assert objectives.config("rwfm").kl_limit is None  # type: ignore[attr-defined]


def check_window_positions() -> None:
    """Seven steps, six of them stochastic, windows of two: closed form of each mode."""

    def begins(mode: str, iterations: range, start: int = 0, every: int = 10, seed: int = 0) -> list[int]:
        window = WindowSection.model_validate({"size": 2, "mode": mode, "start": start, "every": every})
        chosen = [window_steps(window, 7, iteration=i, seed=seed) for i in iterations]
        assert all(b == a + 1 for a, b in chosen)
        return [a for a, _ in chosen]

    assert window_steps(None, 7, iteration=3, seed=0) == (0, 1, 2, 3, 4, 5)
    assert set(begins("fixed", range(40), start=3)) == {3}
    assert begins("progressive", range(80)) == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10 + [4] * 40
    assert begins("progressive", range(6), start=3, every=2) == [3, 3, 4, 4, 4, 4]
    often = begins("random", range(500), every=1)
    counts = [often.count(first) for first in range(5)]
    assert sum(counts) == 500
    assert all(abs(count - 100) < 4 * math.sqrt(80) for count in counts)
    assert set(begins("random", range(200), start=3, every=1)) == {3, 4}
    assert begins("random", range(100)) == [first for first in begins("random", range(10), every=1) for _ in range(10)]
    assert often != begins("random", range(500), every=1, seed=1)


def check_only_the_window_is_stochastic_and_trained() -> None:
    """Other steps are jumps of the map, and the batch holds the window's transitions alone."""
    network, flow_map = two_time()
    cond, groups = grouped(4, 6)
    steps = window_steps(WindowSection(size=1, mode="fixed", start=1), 4, iteration=0, seed=0)
    result = rollout(flow_map, stochasticizer(), cond, groups, GRID, seed=7, latent_shape=SHAPE, stochastic_steps=steps)
    x, keys = noise(sample_keys(groups, 7, 0), SHAPE), sample_keys(groups, 7, 0)
    with torch.no_grad():
        for k, (t_value, s_value) in enumerate(pairwise(GRID)):
            t, s = torch.full((24,), t_value), torch.full((24,), s_value)
            if k == 1:
                density = stochasticizer().transition(flow_map, x, t, s, cond)
                x = density.push(noise([key._replace(step=2) for key in keys], SHAPE))
            else:
                x = flow_map.jump(x, t, s, cond)
    assert torch.equal(result.x0, x)
    state = scored(result, preference(result))
    assert Grpo(GrpoConfig()).prepare(state, toy.policies(network), 0).rows["step"].tolist() == [1] * 24


def check_same_initial_noise() -> None:
    """Shared within a group, different between groups; the noise of later steps stays each sample's own."""
    _, flow_map = two_time()
    cond, groups = grouped(2, 3)
    result = rollout(
        flow_map, stochasticizer(), cond, groups, GRID, seed=7, latent_shape=SHAPE, same_initial_noise=True
    )
    expected = noise([NoiseKey(7, 0, group, 0, 0) for group in groups.tolist()], SHAPE)
    assert torch.equal(result.transitions[0].x_t, expected)
    xi = (result.transitions[0].x_s - result.transitions[0].mean).flatten(1)
    assert len({tuple(row) for row in xi.tolist()}) == 6


def check_per_reward_advantages() -> None:
    """GDPO's example: the groups (0,0),(1,0) and (0,0),(1,1) are equal by their sum, and differ per reward."""
    groups = torch.tensor([0, 0, 1, 1])
    first, second = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    alike = group_advantages(first + second, groups, global_std=False, eps=0.0)
    torch.testing.assert_close(alike, torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    rewards = {"a": first, "b": second}

    def combined(a: float, b: float, scale: float = 1.0, **options: float) -> Tensor:
        scaled = {"a": first, "b": scale * second}
        return combined_advantages(scaled, {"a": a, "b": b}, groups, global_std=False, **{"eps": 0.0, **options})

    torch.testing.assert_close(combined(1, 1), torch.tensor([-1.0, 1.0, -2.0, 2.0]) / math.sqrt(2.5))
    torch.testing.assert_close(combined(2, -1), torch.tensor([-2.0, 2.0, -1.0, 1.0]) / math.sqrt(2.5))
    # neither the units of a reward nor the scale of all weights matters
    torch.testing.assert_close(combined(1, 1, scale=100.0), combined(1, 1))
    torch.testing.assert_close(combined(3, 3), combined(1, 1))
    for tiny in (1e-3, 1e-6):
        # also with the eps that keeps equal advantages from being blown up
        exact = combined(0.8 * tiny, 0.2 * tiny, eps=1e-4)
        torch.testing.assert_close(exact, combined(0.8, 0.2, eps=1e-4))
        torch.testing.assert_close(exact.std(correction=0), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert combined(0, 0, eps=1e-4).eq(0).all()
    assert combined(1, 1, clip_max=0.5).tolist() == [-0.5, 0.5, -0.5, 0.5]
    # with the stds of the batch, which are 1/2 and sqrt(3)/4
    whole = combined_advantages(rewards, {"a": 1.0, "b": 1.0}, groups, global_std=True, eps=0.0)
    total = torch.tensor([-1.0, 1.0, -1 - 2 / math.sqrt(3), 1 + 2 / math.sqrt(3)])
    torch.testing.assert_close(whole, total / total.std(correction=0))
    equal = {"a": torch.full((4,), 0.1), "b": torch.tensor([0.1, 0.1, 0.7, 0.2])}
    assert combined_advantages(equal, {"a": 1.0, "b": 1.0}, groups, global_std=True)[:2].eq(0).all()
