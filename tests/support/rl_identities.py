"""Identities of fmg.rl, one per function: tests call them, and the mutation test calls them on broken sources."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import numpy as np
import torch
from torch.distributions import Independent, Normal, kl_divergence

from fmg.flow import LinearPath, SingleTimeMap
from fmg.flow.sampling import native_sample
from fmg.rl import group_advantages, informative, refresh_old, replay_ratio, rollout, sample, zero_std_ratio
from fmg.rl.configs import GrpoConfig, RwfmConfig
from fmg.rl.grpo import Grpo, clipped_surrogate
from fmg.rl.keyed_noise import NoiseKey
from fmg.rl.replay import mean_distance
from fmg.rl.rollouts import noise, sample_keys, uniform
from fmg.rl.rwfm import RewardWeightedFlowMatching
from tests.support.analytic import gaussian_map
from tests.support.toy import (
    GRID,
    SHAPE,
    drawn,
    grouped,
    policies,
    preference,
    scored,
    single_time,
    stochasticizer,
    two_time,
)

KEYS = [NoiseKey(3, iteration, group, member, 2) for iteration in (-1, 0, 1) for group in range(3) for member in (0, 1)]


def check_noise_depends_on_its_key_alone() -> None:
    """Any split and order of the keys gives the same bits; any change of a key gives different ones."""
    together = noise(KEYS, SHAPE)
    assert torch.equal(together, torch.cat([noise([key], SHAPE) for key in KEYS]))
    assert torch.equal(together.flip(0), noise(KEYS[::-1], SHAPE))
    base = NoiseKey(2**40 + 5, 1, 2, 3, 4)
    others = [base._replace(seed=5), *(base._replace(**{name: 9}) for name in ("iteration", "group", "member", "step"))]
    assert all(not torch.equal(noise([base], SHAPE), noise([other], SHAPE)) for other in others)
    assert not torch.equal(noise([base], SHAPE), noise([base], SHAPE, "objective"))


def check_noise_is_the_documented_generator() -> None:
    """Philox under a blake2b digest, from the start of its stream, whatever was sampled before."""
    for key in KEYS[:3]:
        digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=16, person=b"rollout").digest()
        fresh = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))
        expected = fresh.standard_normal(SHAPE, dtype=np.float32)
        # a sample of odd length leaves half a word in the generator's buffer
        noise([KEYS[-1]], (3,))
        assert np.array_equal(noise([KEYS[-1], key], SHAPE)[1].numpy(), expected)


def check_noise_is_standard_normal() -> None:
    keys = [NoiseKey(0, 0, 0, member, 0) for member in range(400)]
    x = noise(keys, (64,)).double()
    error = 1 / math.sqrt(x.numel())
    assert abs(float(x.mean())) < 4 * error
    assert abs(float(x.var()) - 1) < 4 * math.sqrt(2) * error
    assert abs(float((x[1:] * x[:-1]).mean())) < 4 * error
    u = uniform(keys).double()
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 / math.sqrt(12 * len(u))


def check_rollout_records_what_it_did() -> None:
    """States chain, the noise is the keyed one, log-probs are those of the recorded density, the end is a jump."""
    _, flow_map = two_time()
    result = drawn(flow_map)
    x = noise(sample_keys(result.groups, 7, 0), SHAPE)
    assert [step.index for step in result.transitions] == [0, 1, 2]
    for step in result.transitions:
        k = step.index
        assert torch.equal(step.x_t, x)
        assert step.t.tolist() == [GRID[k]] * len(x)
        assert step.s.tolist() == [GRID[k + 1]] * len(x)
        density = stochasticizer().transition(flow_map, x, step.t, step.s, result.cond)
        keys = [key._replace(step=k + 1) for key in sample_keys(result.groups, 7, 0)]
        x = density.push(noise(keys, SHAPE)).detach()
        assert torch.equal(step.x_s, x)
        assert torch.equal(step.mean, density.mean)
        assert torch.equal(step.std, density.std)
        assert torch.equal(step.log_prob, density.log_prob(x))
    ends = (torch.full((len(x),), GRID[-2]), torch.zeros(len(x)))
    assert torch.equal(result.x0, flow_map.jump(x, *ends, result.cond))


def check_rollout_keeps_the_path() -> None:
    """An exact map and an exact kernel end in the data distribution: mean and covariance within 4 standard errors."""
    flow_map = gaussian_map(LinearPath())
    cond, groups = grouped(1, 4000)
    result = rollout(flow_map, stochasticizer(), cond, groups, GRID, seed=0, latent_shape=(2,))
    x, n = result.x0.double(), len(cond)
    spread = flow_map.covariance.diagonal().sqrt()
    assert bool(((x.mean(0) - flow_map.mean).abs() < 4 * spread / math.sqrt(n)).all())
    variances = spread.square()
    errors = ((variances[:, None] * variances + flow_map.covariance.square()) / n).sqrt()
    assert bool(((torch.cov(x.T) - flow_map.covariance).abs() < 4 * errors).all())


def check_sample_is_the_native_sampler() -> None:
    """A two-time map composes jumps; a single-time one samples new keyed noise at every interior time."""
    cond, groups = grouped(2, 3)
    keys = sample_keys(groups, 5, 0)
    x_1 = noise(keys, SHAPE)
    _, flow_map = two_time()
    x = x_1
    for t, s in pairwise(GRID):
        x = flow_map.jump(x, torch.full((6,), t), torch.full((6,), s), cond)
    assert torch.equal(sample(flow_map, cond, x_1, GRID, batch_size=4), x)
    _, endpoint = single_time()
    expected = native_sample(
        endpoint, cond, x_1, GRID, lambda k: noise([key._replace(step=k + 1) for key in keys], SHAPE)
    )
    assert torch.equal(sample(endpoint, cond, x_1, GRID, keys=keys, batch_size=4), expected)


def check_advantages_closed_form() -> None:
    rewards = torch.tensor([1.0, 3.0, 2.0, 2.0, 10.0, 0.0, 5.0])
    groups = torch.tensor([4, 4, 0, 0, 9, 9, 9])
    by_group = group_advantages(rewards, groups, global_std=False, eps=0.0)
    third = math.sqrt(50 / 3)
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0, 5 / third, -5 / third, 0.0])
    torch.testing.assert_close(by_group, expected)
    std = float(np.std(rewards.numpy()))
    whole = group_advantages(rewards, groups, global_std=True)
    centred = torch.tensor([-1.0, 1.0, 0.0, 0.0, 5.0, -5.0, 0.0])
    torch.testing.assert_close(whole, centred / (std + 1e-4))
    assert whole[[2, 3]].tolist() == [0.0, 0.0]
    lone = torch.tensor([0.0] * 99 + [1.0])
    assert group_advantages(lone, torch.zeros(100, dtype=torch.long), global_std=False)[-1] == 5.0
    assert zero_std_ratio(rewards, groups) == 1 / 3


def check_equal_rewards_have_no_advantage() -> None:
    """Exactly 0, although the mean of equal floats need not be that float."""
    for value in (0.1, 1 / 3, 1e-8, -123.456, 1e7):
        rewards = torch.full((23,), value, dtype=torch.float64)
        groups = torch.arange(23) % 2
        for global_std in (False, True):
            assert group_advantages(rewards, groups, global_std=global_std).eq(0).all()
    mixed = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.2, 0.9])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    advantages = group_advantages(mixed, groups, global_std=True)
    assert advantages[:3].eq(0).all()
    assert informative(advantages, groups).tolist() == [False] * 3 + [True] * 3


def check_replay_gives_ratio_one() -> None:
    """Identity 4 of theory: nothing has moved, so every ratio is exactly 1 and every distance 0."""
    network, flow_map = two_time()
    result = drawn(flow_map)
    kernel = stochasticizer()
    objective = Grpo(GrpoConfig(kl_beta=0.5)).bind(kernel)
    views = policies(network)
    batch = objective.prepare(scored(result, preference(result)), views, seed=0)
    assert len(batch) == 3 * 24
    assert replay_ratio(kernel, views, batch, 10) == 0.0
    parts = objective.loss(views, batch).parts
    assert {key: float(value) for key, value in parts.items()} == {
        "approx_kl": 0.0,
        "ratio_mean": 1.0,
        "ratio_max": 1.0,
        "clip_frac": 0.0,
        "kl_ref": 0.0,
    }


def check_first_gradient_is_reinforce() -> None:
    """At ratio 1 the gradient is `-mean_k A_k d logp_k`, and for this map `d logp` is known in closed form.

    With anchor `a = s/2` the mean is `scale_as (x_t - (t - a) u)`, so `d mean / d shift = -scale_as (t - a)`.
    """
    network, flow_map = two_time()
    result = drawn(flow_map)
    objective = Grpo(GrpoConfig()).bind(stochasticizer())
    views = policies(network)
    state = scored(result, preference(result))
    batch = objective.prepare(state, views, seed=0)
    objective.loss(views, batch).total.backward()  # type: ignore[no-untyped-call]
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for step in result.transitions:
        t, s = step.t.double(), step.s.double()
        a = s / 2
        scale = (1 - s) / (1 - a)
        score = (step.x_s - step.mean).double() / step.std.double().square()[:, None, None] / math.prod(SHAPE)
        slope = (-scale * (t - a))[:, None, None]
        expected -= (state.advantages.double()[:, None, None] * score * slope).sum(0)
    assert network.shift.grad is not None
    torch.testing.assert_close(network.shift.grad.double(), expected / len(batch), rtol=1e-4, atol=1e-6)


def check_ratio_and_distances_after_a_step() -> None:
    """After a known shift of the mean, ratio, policy KL, clip fraction and reference KL follow in closed form."""
    network, flow_map = two_time()
    result = drawn(flow_map)
    views = policies(network)
    clip, beta = 0.01, 0.5
    objective = Grpo(GrpoConfig(clip_range=clip, kl_beta=beta)).bind(stochasticizer())
    state = scored(result, preference(result))
    batch = objective.prepare(state, views, seed=0)
    with torch.no_grad():
        network.shift += 0.05
    ratios, distances = [], []
    for step in result.transitions:
        a = step.s.double() / 2
        moved = -0.05 * (1 - step.s) / (1 - a) * (step.t - a)
        std = step.std.double()
        residual = (step.x_s - step.mean).double()
        before = residual.square().flatten(1).mean(1)
        after = (residual - moved[:, None, None]).square().flatten(1).mean(1)
        ratios.append(((before - after) / (2 * std.square())).exp())
        distances.append(moved.square() / (2 * std.square()))
    ratio, distance = torch.cat(ratios), torch.cat(distances)
    advantage = state.advantages.double().repeat(3)
    surrogate = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    loss = objective.loss(views, batch)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(loss.parts["ratio_mean"].double(), ratio.mean(), **close)
    torch.testing.assert_close(loss.parts["ratio_max"].double(), ratio.max(), **close)
    torch.testing.assert_close(loss.parts["approx_kl"].double(), distance.mean(), **close)
    torch.testing.assert_close(loss.parts["kl_ref"].double(), distance.mean(), **close)
    torch.testing.assert_close(loss.parts["clip_frac"].double(), ((ratio - 1).abs() > clip).double().mean(), **close)
    assert 0 < float(loss.parts["clip_frac"]) < 1
    torch.testing.assert_close(loss.total.double(), surrogate.mean() + beta * distance.mean(), **close)
    torch.testing.assert_close(
        torch.tensor(replay_ratio(stochasticizer(), views, batch, 7)).double(), (ratio - 1).abs().max(), **close
    )
    fresh = refresh_old(stochasticizer(), views, batch, 7)
    assert replay_ratio(stochasticizer(), views, fresh, 7) == 0.0
    refreshed = objective.loss(views, fresh).parts
    assert (float(refreshed["ratio_max"]), float(refreshed["approx_kl"])) == (1.0, 0.0)


def check_weights_scale_rows() -> None:
    """A row of weight w counts w times in the policy term."""
    network, flow_map = two_time()
    result = drawn(flow_map)
    views = policies(network)
    objective = Grpo(GrpoConfig()).bind(stochasticizer())
    batch = objective.prepare(scored(result, preference(result)), views, seed=0)
    weight = torch.linspace(0, 3, len(batch))
    total = objective.loss(views, batch.with_rows(weight=weight)).total
    torch.testing.assert_close(total, -(weight * batch.rows["advantage"]).mean())


def check_clip_is_pessimistic() -> None:
    """PPO's four cases: the clip acts only where the policy already moved towards a higher surrogate."""
    cases = (  # ratio, advantage, loss, slope of the loss in the ratio
        (1.3, 2.0, -2.2, 0.0),
        (0.7, 2.0, -1.4, -2.0),
        (1.3, -2.0, 2.6, 2.0),
        (0.7, -2.0, 1.8, 0.0),
        (1.05, 2.0, -2.1, -2.0),
    )
    for value, advantage, expected, slope in cases:
        ratio = torch.tensor([value], requires_grad=True)
        loss = clipped_surrogate(ratio, torch.tensor([advantage]), 0.1, 0.1)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert ratio.grad is not None
        torch.testing.assert_close(loss.detach(), torch.tensor([expected]))
        assert float(ratio.grad) == slope


def check_mean_distance_is_a_kl() -> None:
    """Parity with torch.distributions, averaged over coordinates."""
    draw = noise(KEYS, SHAPE)
    other, std = 0.3 * noise(KEYS, SHAPE, "objective"), torch.linspace(0.05, 1.5, len(KEYS))
    wide = std[:, None, None].expand(-1, *SHAPE)
    kl = kl_divergence(Independent(Normal(draw, wide), 2), Independent(Normal(other, wide), 2)) / math.prod(SHAPE)
    torch.testing.assert_close(mean_distance(draw, other, std), kl)


def check_rwfm_targets() -> None:
    """Rows lie on the path, weights are exp(A / temperature) with mean 1, targets fit the map's kind."""
    network, flow_map = two_time()
    result = drawn(flow_map)
    state = scored(result, preference(result))
    objective = RewardWeightedFlowMatching(RwfmConfig(temperature=0.5, draws=3))
    views = policies(network)
    batch = objective.prepare(state, views, seed=1)
    x_0 = result.x0.repeat(3, 1, 1)
    x_t, t, target, weight = (batch.rows[name] for name in ("x_t", "t", "target", "weight"))
    assert bool(((t > 0) & (t <= 1)).all())
    torch.testing.assert_close(x_t, x_0 + t[:, None, None] * target)
    eps = target + x_0
    assert abs(float(eps.mean())) < 4 / math.sqrt(eps.numel())
    assert abs(float(eps.var()) - 1) < 4 * math.sqrt(2 / eps.numel())
    expected = (state.advantages.repeat(3) / 0.5).exp()
    torch.testing.assert_close(weight, expected / expected.mean())
    loss = objective.loss(views, batch)
    u = network(x_t, t, t, batch.cond)
    error = (u - target).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.total, (weight * error).mean())
    torch.testing.assert_close(loss.parts["match"], error.detach().mean())
    endpoint_network, _ = single_time()
    endpoint = policies(endpoint_network, SingleTimeMap)
    rows = objective.prepare(state, endpoint, seed=1).rows
    assert torch.equal(rows["x_t"], x_t)
    assert torch.equal(rows["target"], x_0)
    denoised = endpoint.current.jump(x_t, t, torch.zeros_like(t), batch.cond)
    single = objective.loss(endpoint, objective.prepare(state, endpoint, seed=1)).total
    torch.testing.assert_close(single, (weight * (denoised - x_0).square().flatten(1).mean(1)).mean())
