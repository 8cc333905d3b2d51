"""Identities of branched rollouts, one per function: called by tests, and by the mutation test on broken sources."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fmg.core.protocols import FlowMap
from fmg.core.types import Batch, BranchRollout, Conditioning, RewardOutput, ScoredRollout
from fmg.flow import Gaussian, LinearPath
from fmg.flow.sampling import native_sample
from fmg.rl import group_advantages, refresh_old, replay_ratio, rollout, sample
from fmg.rl.branches import Branching, StepChooser, branch_rollout, reward_spread, within_correlation
from fmg.rl.configs import GrpoConfig
from fmg.rl.grpo import Grpo, noise_weights
from fmg.rl.rollouts import noise, sample_keys
from tests.support.analytic import gaussian_map
from tests.support.toy import GRID, SHAPE, grouped, policies, preference, single_time, stochasticizer, two_time

MIXED = (0, 2, 1, 1)
OPTIONS: tuple[dict[str, object], ...] = (
    {},
    {"clip_range": 0.02, "clip_range_high": 0.05},
    {"ratio_norm": True},
    {"noise_weighting": True, "noise_power": -1.0},
    {"kl_beta": 0.5},
)


def branched(
    flow_map: FlowMap,
    steps: tuple[int, ...] = MIXED,
    how: Branching | None = None,
    batch_size: int | None = None,
    kernel: object = None,
) -> BranchRollout:
    cond = Conditioning(tuple(f"prompt {g}" for g in range(len(steps))), {})
    return branch_rollout(
        flow_map, kernel or stochasticizer(), cond, range(len(steps)), steps, GRID, how or Branching(6),
        seed=7, latent_shape=SHAPE, batch_size=batch_size,
    )  # fmt: skip


def scored_stars(stars: BranchRollout) -> ScoredRollout:
    values = preference(stars)
    return ScoredRollout(stars, RewardOutput(values, {}), group_advantages(values, stars.groups))


def repeated(batch: Batch) -> Batch:
    """The rows of stars expanded: one for each sibling, as in a chain."""
    siblings = ("x_s", "log_prob_old", "advantage")
    size = batch.rows["x_s"].shape[1]
    rows = {k: v.flatten(0, 1) if k in siblings else v.repeat_interleave(size, 0) for k, v in batch.rows.items()}
    return Batch(rows, batch.cond.select(torch.arange(len(batch)).repeat_interleave(size)))


def check_a_star_is_a_chain_with_one_stochastic_step() -> None:
    """Bit for bit: the same keyed noise, states, densities and images as a chain with one initial noise per group."""
    _, flow_map = two_time()
    cond, groups = grouped(4, 6)
    for k in range(3):
        chain = rollout(
            flow_map, stochasticizer(), cond, groups, GRID,
            seed=7, latent_shape=SHAPE, same_initial_noise=True, stochastic_steps=[k],
        )  # fmt: skip
        stars = branched(flow_map, (k,) * 4, Branching(6, "grid"))
        (step,) = chain.transitions
        assert torch.equal(stars.x0, chain.x0)
        assert torch.equal(stars.x_s.flatten(0, 1), step.x_s)
        assert torch.equal(stars.log_prob.flatten(), step.log_prob)
        for mine, theirs in ((stars.x_t, step.x_t), (stars.mean, step.mean), (stars.std, step.std)):
            assert torch.equal(mine.repeat_interleave(6, 0), theirs)
        assert torch.equal(stars.groups, chain.groups)
        assert stars.cond.prompts == chain.cond.prompts
        assert stars.step.tolist() == [step.index] * 4


def check_a_star_row_equals_its_repeated_rows() -> None:
    """Loss, parts and gradient of one row per group equal those of a row per sibling, for every option of `grpo`."""
    for options in OPTIONS:
        results = []
        for write_out in (False, True):
            network, flow_map = two_time()
            views = policies(network)
            objective = Grpo(GrpoConfig.model_validate(options)).bind(stochasticizer())
            batch = objective.prepare(scored_stars(branched(flow_map)), views, seed=0)
            assert len(batch) == len(MIXED)
            batch = repeated(batch) if write_out else batch
            with torch.no_grad():
                network.shift += 0.05
            loss = objective.loss(views, batch)
            loss.total.backward()  # type: ignore[no-untyped-call]
            assert network.scale.grad is not None
            assert network.shift.grad is not None
            assert 0 < float(loss.parts["clip_frac"]) <= 1
            results.append((loss.total.detach(), network.scale.grad, network.shift.grad, *loss.parts.values()))
        for stars, rows in zip(*results, strict=True):
            torch.testing.assert_close(stars, rows, rtol=1e-6, atol=1e-6)


def check_stars_equal_the_chain_in_loss_and_gradient() -> None:
    """The acceptance identity: transition `k` of the same states and noises, as a chain and as stars."""
    results = []
    for kind in ("chain", "branch"):
        network, flow_map = two_time()
        views = policies(network)
        objective = Grpo(GrpoConfig(clip_range=0.02)).bind(stochasticizer())
        if kind == "chain":
            cond, groups = grouped(4, 6)
            drawn = rollout(
                flow_map, stochasticizer(), cond, groups, GRID,
                seed=7, latent_shape=SHAPE, same_initial_noise=True, stochastic_steps=[1],
            )  # fmt: skip
        else:
            drawn = branched(flow_map, (1,) * 4, Branching(6, "grid"))  # type: ignore[assignment]
        values = preference(drawn)
        state = ScoredRollout(drawn, RewardOutput(values, {}), group_advantages(values, drawn.groups))
        batch = objective.prepare(state, views, seed=0)
        with torch.no_grad():
            network.shift += 0.05
        loss = objective.loss(views, batch)
        loss.total.backward()  # type: ignore[no-untyped-call]
        results.append((loss.total.detach(), network.scale.grad, network.shift.grad))
    for chain, stars in zip(*results, strict=True):
        torch.testing.assert_close(stars, chain, rtol=1e-6, atol=1e-6)


def check_the_gate_replays_stars() -> None:
    """Nothing has moved: ratio 1 to the bit; after a step the recomputed log-probs give it again."""
    network, flow_map = two_time()
    views, kernel = policies(network), stochasticizer()
    objective = Grpo(GrpoConfig()).bind(kernel)
    batch = objective.prepare(scored_stars(branched(flow_map)), views, seed=0)
    assert replay_ratio(kernel, views, batch, 3) == 0.0
    with torch.no_grad():
        network.shift += 0.05
    assert replay_ratio(kernel, views, batch, 3) > 1e-3
    fresh = refresh_old(kernel, views, batch, 3)
    assert fresh.rows["log_prob_old"].shape == (4, 6)
    assert replay_ratio(kernel, views, fresh, 3) == 0.0


@dataclass(frozen=True)
class _Still(Gaussian):
    """A density whose samples are its mean."""

    def push(self, noise: Tensor) -> Tensor:
        return self.mean


class _StillKernel:
    path_preserving = False

    def transition(self, flow_map: FlowMap, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Gaussian:
        return _Still(flow_map.jump(x_t, t, s, cond), torch.ones_like(t))


def check_the_grid_without_noise_is_the_deterministic_sampler() -> None:
    """Bit for bit, wherever a group branches and however it got there."""
    _, flow_map = two_time()
    cond = Conditioning(tuple(f"prompt {g}" for g in range(4)), {})
    x_1 = noise(sample_keys(torch.arange(4), 7, 0, torch.zeros(4, dtype=torch.int64)), SHAPE)
    expected = sample(flow_map, cond, x_1, GRID).repeat_interleave(6, 0)
    for prefix in ("native", "stochastic"):
        stars = branched(flow_map, MIXED, Branching(6, "grid", prefix), kernel=_StillKernel())
        assert torch.equal(stars.x0, expected)


def check_the_stochastic_prefix_is_the_kernel() -> None:
    """The branching state is that of a chain whose group shares all noise: member 0 of every step."""
    _, flow_map = two_time()
    kernel = stochasticizer()
    stars = branched(flow_map, (2,) * 4, Branching(6, prefix="stochastic"))
    cond = Conditioning(tuple(f"prompt {g}" for g in range(4)), {})
    chain = rollout(flow_map, kernel, cond, range(4), GRID, seed=7, latent_shape=SHAPE)
    assert torch.equal(stars.x_t, chain.transitions[2].x_t)


def check_completions_are_one_jump() -> None:
    """`jump` ends every sibling by `X_{s->0}` of any map, which may be another than the policy's."""
    for _, flow_map in (two_time(), single_time()):
        kernel = stochasticizer("asfmc-endpoint", noise_level=1.0)
        stars = branched(flow_map, kernel=kernel)
        s = stars.s.repeat_interleave(6)
        expected = flow_map.jump(stars.x_s.flatten(0, 1), s, torch.zeros_like(s), stars.cond)
        assert torch.equal(stars.x0, expected)
        assert stars.s.tolist() == [GRID[k + 1] for k in MIXED]
    network, flow_map = two_time()
    other, elsewhere = two_time()
    with torch.no_grad():
        other.shift += 1
    cond = Conditioning(("p",) * 2, {})
    drawn = branch_rollout(
        flow_map, stochasticizer(), cond, [0, 1], [0, 1], GRID, Branching(4),
        seed=7, latent_shape=SHAPE, completing=elsewhere,
    )  # fmt: skip
    assert network.calls == 2
    s = drawn.s.repeat_interleave(4)
    assert torch.equal(drawn.x0, elsewhere.jump(drawn.x_s.flatten(0, 1), s, torch.zeros_like(s), drawn.cond))


def check_stars_cost_what_theory_says() -> None:
    """`k + 1` calls of one row per group and, with `jump`, one row per sibling."""
    network, flow_map = two_time()
    branched(flow_map, (2,) * 4)
    assert network.calls == 2 + 1 + 1


def check_every_process_makes_the_calls_of_the_span() -> None:
    """With groups at step 1 alone, a span of all steps costs the calls of all, and changes no sample."""
    counts, drawn = [], []
    for span in (None, (0, 2)):
        network, flow_map = two_time()
        cond = Conditioning(("a", "b"), {})
        drawn.append(
            branch_rollout(
                flow_map,
                stochasticizer(),
                cond,
                [0, 1],
                [1, 1],
                GRID,
                Branching(4, "grid"),
                seed=7,
                latent_shape=SHAPE,
                span=span,
            )
        )
        counts.append(network.calls)
    assert counts == [1 + 1 + 2, 2 + 1 + 3]
    assert torch.equal(drawn[0].x0, drawn[1].x0)
    assert torch.equal(drawn[0].x_t, drawn[1].x_t)


def check_stars_do_not_depend_on_batches() -> None:
    _, flow_map = two_time()
    for how in (Branching(6), Branching(6, "grid", "stochastic", antithetic=True)):
        whole, parts = (branched(flow_map, MIXED, how, size) for size in (None, 7))
        for name in ("x0", "x_t", "x_s", "mean", "log_prob", "step", "t", "s", "std", "groups"):
            assert torch.equal(getattr(whole, name), getattr(parts, name))
        assert whole.cond.prompts == parts.cond.prompts
    _, single = single_time()
    kernel = stochasticizer("asfmc-endpoint", noise_level=1.0)
    whole, parts = (branched(single, MIXED, Branching(6, "grid"), size, kernel) for size in (None, 7))
    assert torch.equal(whole.x0, parts.x0)


def check_a_single_time_map_completes_by_its_sampler() -> None:
    """Multistep consistency sampling from every sibling on, with the noise of its own key."""
    _, single = single_time()
    stars = branched(single, (0,) * 4, Branching(6, "grid"), kernel=stochasticizer("asfmc-endpoint", noise_level=1.0))
    keys = sample_keys(stars.groups, 7, 0)

    def renoise(interval: int) -> Tensor:
        return noise([key._replace(step=interval + 2) for key in keys], SHAPE)

    assert torch.equal(stars.x0, native_sample(single, stars.cond, stars.x_s.flatten(0, 1), GRID[1:], renoise))


def check_antithetic_siblings_mirror() -> None:
    _, flow_map = two_time()
    stars = branched(flow_map, how=Branching(6, antithetic=True))
    offsets = stars.x_s - stars.mean[:, None]
    torch.testing.assert_close(offsets[:, 0::2], -offsets[:, 1::2], rtol=1e-5, atol=1e-6)
    assert offsets[:, 0::2].flatten(0, 1).unique(dim=0).shape[0] == 12


def check_stars_keep_the_path() -> None:
    """An exact map and an exact kernel: every completion follows the data distribution, within 4 standard errors."""
    flow_map, count = gaussian_map(LinearPath()), 4000
    cond = Conditioning(("",) * count, {})
    steps = torch.arange(count) % 3
    for how in (Branching(2), Branching(2, "grid", "stochastic")):
        stars = branch_rollout(
            flow_map, stochasticizer(), cond, range(count), steps, GRID, how, seed=0, latent_shape=(2,)
        )
        x = stars.x0[::2].double()
        spread = flow_map.covariance.diagonal().sqrt()
        assert bool(((x.mean(0) - flow_map.mean).abs() < 4 * spread / math.sqrt(count)).all())
        variances = spread.square()
        errors = ((variances[:, None] * variances + flow_map.covariance.square()) / count).sqrt()
        assert bool(((torch.cov(x.T) - flow_map.covariance).abs() < 4 * errors).all())


def check_the_gradient_has_its_closed_form_and_variance() -> None:
    """A linear reward through an affine map (docs/math.md, eq. 32 and 33).

    With the completion `X_{s->0}(x) = A x + b`, reward `w . x_0` and advantages `R - mean`, the expected gradient is
    `-(1 - 1/M) / D (d mean / d theta)^T A w`. The chain adds the reward's variance from every other noise to it, and
    that of a coordinate of the gradient is `(|v|^2 + v_e^2) / (|v_k|^2 + v_e^2)` times the star's: `v` holds the slope
    of the reward in all noises, `v_k` in those of the transition, `v_e` in the noise of that coordinate.
    """
    size, count, k = 32, 1500, 1
    network, flow_map = two_time()
    kernel = stochasticizer()
    weight = torch.linspace(-1, 2, 6).reshape(SHAPE)
    cond, index = grouped(count, size)
    stars = branch_rollout(
        flow_map, kernel, Conditioning(cond.prompts[::size], {}), range(count), [k] * count, GRID,
        Branching(size, "grid"), seed=3, latent_shape=SHAPE,
    )  # fmt: skip
    chain = rollout(flow_map, kernel, cond, index, GRID, seed=4, latent_shape=SHAPE)
    scale = network.scale.detach()
    t, s, a = GRID[k], GRID[k + 1], GRID[k + 1] / 2
    slope = -(1 - s) / (1 - a) * (t - a)

    def to_zero(x: float) -> Tensor:
        """Slope of the image in the state at grid time `x`, along the deterministic grid."""
        steps = [(u, v) for u, v in pairwise(GRID) if u <= x]
        return math.prod((1 - (u - v) * scale for u, v in steps), start=torch.ones(SHAPE))

    def by_group(residual: Tensor, std: Tensor, x0: Tensor) -> Tensor:
        rewards = (weight * x0).flatten(1).sum(1).reshape(count, size)
        advantage = (rewards - rewards.mean(1, keepdim=True)).reshape(-1, 1, 1)
        score = residual / std.square()[:, None, None] / weight.numel() * slope
        return -(advantage * score).reshape(count, size, *SHAPE).mean(1)

    residual = (stars.x_s - stars.mean[:, None]).flatten(0, 1)
    mine = by_group(residual, stars.std.repeat_interleave(size), stars.x0)
    expected = -(1 - 1 / size) / weight.numel() * slope * to_zero(s) * weight
    error = mine.std(0) / math.sqrt(count)
    assert bool(((mine.mean(0) - expected).abs() < 4 * error).all())

    # what the objective computes is the mean of these
    rewards = (weight * stars.x0).flatten(1).sum(1).reshape(count, size)
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    objective, views = Grpo(GrpoConfig()).bind(kernel), policies(network)
    batch = objective.prepare(ScoredRollout(stars, RewardOutput(advantages, {}), advantages), views, 0)
    objective.loss(views, batch).total.backward()  # type: ignore[no-untyped-call]
    assert network.shift.grad is not None
    torch.testing.assert_close(network.shift.grad, mine.mean(0), rtol=1e-4, atol=1e-5)

    step = chain.transitions[k]
    theirs = by_group(step.x_s - step.mean, step.std, chain.x0)
    kept = [(1 - GRID[j + 1]) / (1 - GRID[j + 1] / 2) * (1 - (GRID[j] - GRID[j + 1] / 2) * scale) for j in range(3)]
    last = 1 - GRID[3] * scale
    reach = [math.prod(kept[j + 1 :], start=torch.ones(SHAPE)) * last * weight for j in range(3)]
    noises = [reach[j] * chain.transitions[j].std[0] for j in range(3)]
    initial = math.prod(kept, start=torch.ones(SHAPE)) * last * weight
    everything = sum(float(v.square().sum()) for v in (*noises, initial))
    own = to_zero(s) * weight * stars.std[0]
    predicted = (everything + noises[k].square()) / (own.square().sum() + own.square())
    found = theirs.var(0) / mine.var(0)
    assert bool(((found / predicted).log().abs() < 4 * math.sqrt(4 / count)).all())
    assert bool((predicted > 1).all()), predicted


def check_noise_weights_take_a_power() -> None:
    std = torch.tensor([0.1, 0.2, 0.4])
    torch.testing.assert_close(noise_weights(std, -1.0), std.reciprocal() / std.reciprocal().mean())
    assert torch.equal(noise_weights(std, 1.0), noise_weights(std))


def check_reward_spread_by_step() -> None:
    rewards = torch.tensor([0.0, 2.0, 1.0, 1.0, 5.0, 9.0, 3.0, float("nan")])
    spread, equal = reward_spread(rewards, torch.tensor([0, 0, 2, 1]))
    assert spread == {0: 0.5, 2: 2.0}
    assert equal == {0: 0.5, 2: 0.0}


def check_correlation_within_groups() -> None:
    """Levels of groups do not matter, groups with equal or missing rewards are skipped; None if no group is left."""
    one = torch.tensor([0.0, 1.0, 2.0, 5.0, 5.0, 5.0])
    assert within_correlation(one, 7 - 2 * one, 3) == -1.0
    crossed = within_correlation(one, torch.tensor([0.0, 1.0, 0.0, 9.0, 1.0, 5.0]), 3)
    assert crossed is not None
    assert abs(crossed) < 1e-12
    assert within_correlation(torch.ones(6), one, 3) is None
    # a group in which an image has no score is left out
    nan = float("nan")
    assert (
        within_correlation(torch.tensor([*one.tolist(), nan, 0.0, 1.0]), torch.cat([7 - 2 * one, torch.ones(3)]), 3)
        == -1.0
    )
    assert within_correlation(torch.tensor([nan, 0.0, 1.0]), torch.tensor([0.0, 1.0, 2.0]), 3) is None


def check_steps_are_chosen_as_asked() -> None:
    assert StepChooser("first", 3, 0.05, 0).choose(5, 4).tolist() == [0] * 4
    cycle = StepChooser("cycle", 3, 0.05, 0)
    assert torch.cat([cycle.choose(i, 4) for i in range(3)]).tolist() == [0, 1, 2] * 4
    drawn = torch.cat([StepChooser("random", 3, 0.05, 1).choose(i, 500) for i in range(4)])
    assert (torch.bincount(drawn) - 2000 / 3).abs().max() < 4 * math.sqrt(2000 * 2 / 9)
    assert torch.equal(drawn[:500], StepChooser("random", 3, 0.05, 1).choose(0, 500))
    assert not torch.equal(drawn[:500], drawn[500:1000])
    adaptive = StepChooser("adaptive", 3, 0.05, 0)
    assert torch.bincount(adaptive.choose(0, 48)).tolist() == [16, 16, 16]
    adaptive.learn({0: 0.3, 1: 0.1})
    assert adaptive.shares() == [1 / 3] * 3
    adaptive.learn({2: 0.0})
    shares = [0.05 + 0.85 * 0.9, 0.05 + 0.85 * 0.1, 0.05]
    assert torch.allclose(torch.tensor(adaptive.shares()), torch.tensor(shares))
    counts = torch.bincount(adaptive.choose(1, 1000), minlength=3)
    assert (counts - 1000 * torch.tensor(shares)).abs().max() <= 1
    adaptive.learn({2: 0.5})
    assert {k: round(v, 9) for k, v in adaptive.state().items()} == {"0": 0.3, "1": 0.1, "2": 0.1}
    adaptive.learn({2: 0.6})
    assert round(adaptive.state()["2"], 9) == 0.8 * 0.1 + 0.2 * 0.6
    twin = StepChooser("adaptive", 3, 0.05, 0)
    twin.restore(adaptive.state())
    assert torch.equal(twin.choose(9, 48), adaptive.choose(9, 48))


def check_a_group_with_equal_rewards_is_left_out() -> None:
    """A group whose completions got equal rewards is left out completely; the others keep their rows in order."""
    network, flow_map = two_time()
    stars = branched(flow_map)
    values = preference(stars)
    values[6:12] = 0.5
    state = ScoredRollout(stars, RewardOutput(values, {}), group_advantages(values, stars.groups))
    batch = Grpo(GrpoConfig()).bind(stochasticizer()).prepare(state, policies(network), seed=0)
    assert batch.rows["step"].tolist() == [0, 1, 1]
    assert batch.cond.prompts == ("prompt 0", "prompt 2", "prompt 3")
    assert torch.equal(batch.rows["x_s"], stars.x_s[[0, 2, 3]])
    assert torch.equal(batch.rows["advantage"].flatten(), state.advantages.reshape(4, 6)[[0, 2, 3]].flatten())
