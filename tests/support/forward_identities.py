"""Closed forms of the objectives on noised samples, of DPPO's mask and of REINFORCE; called like `rl_identities`.

The toy network is `u = scale x + shift + 0.3 (t + s)`, so its derivative along `(v, 1)` is `scale v + 0.3`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fmg.core.types import Batch, Conditioning, RewardOutput, SampleRollout, ScoredRollout
from fmg.flow import LinearPath, SingleTimeMap, TrigFlowMap, TwoTimeMap
from fmg.registry import objectives
from fmg.rl.configs import GrpoConfig, MeanFlowNftConfig, Noising
from fmg.rl.forward import Errors, ForwardObjective
from fmg.rl.grpo import Grpo, masked_surrogate
from fmg.rl.noised import noised, shared_correction, velocity_error
from tests.support.toy import (
    Network,
    ToyPolicies,
    drawn,
    policies,
    preference,
    scored,
    single_time,
    stochasticizer,
    two_time,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
ADVANTAGE = torch.tensor([1.5, -2.0, 0.5])


def _state() -> ScoredRollout:
    result = drawn(two_time()[1])
    return scored(result, preference(result))


def _objective(name: str, **options: object) -> ForwardObjective:  # type: ignore[type-arg]
    built: ForwardObjective = objectives.build(name, options)  # type: ignore[type-arg]
    return built


def _errors(moved: float = 0.0) -> Errors:
    """Errors of two coordinates in three rows, at given times on the linear path; `moved` from the old policy."""
    old = torch.tensor([[0.3, -0.5], [1.0, 0.2], [-0.4, 0.6]])
    new = (old + moved * torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, 0.1]])).requires_grad_()
    base = old + torch.tensor([[0.1, 0.0], [0.0, -0.2], [0.2, 0.2]])
    t = torch.tensor([0.2, 0.5, 0.9])
    return Errors(new, old, base, ADVANTAGE, t, t)


def _slope(objective: ForwardObjective, errors: Errors) -> Tensor:  # type: ignore[type-arg]
    objective._by_row(errors).sum().backward()
    assert errors.new.grad is not None
    return errors.new.grad


def check_noised_rows() -> None:
    """Rows lie on the path, draws and samples have noise of their own, and intervals have their shares."""
    _, flow_map = two_time()
    state = _state()
    how = Noising(draws=400, min_time=0.1, time_shift=3.0, diagonal=0.5, to_data=0.2)
    rows = noised(state, flow_map, how, seed=4, objective="o").rows
    x_0, t, s = state.rollout.x0.repeat(400, 1, 1), rows["t"], rows["s"]
    torch.testing.assert_close(rows["x_t"], x_0 + t[:, None, None] * rows["target"])
    torch.testing.assert_close(rows["advantage"], state.advantages.repeat(400))
    # undoing the shift gives uniform times
    level = t / (3 - 2 * t)
    assert float(level.min()) > 0.1
    torch.testing.assert_close(level.sort().values, torch.linspace(0.1, 1, len(t)), atol=0.02, rtol=0)
    shares = (s == t).float().mean(), (s == 0).float().mean()
    torch.testing.assert_close(torch.stack(shares), torch.tensor([0.5, 0.2]), atol=0.02, rtol=0)
    general = (s < t) & (s > 0)
    share = (s / t)[general].sort().values
    torch.testing.assert_close(share, torch.linspace(0, 1, len(share)), atol=0.03, rtol=0)
    # noise, times and intervals are independent
    assert abs(float(torch.corrcoef(torch.stack([t[general], (s / t)[general]]))[0, 1])) < 0.05
    assert len(rows["target"].flatten(1)[:, 0].unique()) == len(t)
    other = noised(state, flow_map, how, seed=5, objective="o").rows
    assert not torch.equal(other["t"], t)
    # fewer rows are the first of more
    few = noised(state, flow_map, replace(how, draws=2), seed=4, objective="o").rows
    assert all(torch.equal(few[name], rows[name][:48]) for name in few)


def check_ordered_times() -> None:
    """t is the larger of two uniform times in every row, and a general s the smaller one, both shifted."""
    how = Noising(draws=400, time_shift=3.0, diagonal=0.4, to_data=0.2, ordered=True)
    rows = noised(_state(), two_time()[1], how, seed=4, objective="o").rows
    t, s = (rows[name] / (3 - 2 * rows[name]) for name in ("t", "s"))
    # the squared maximum of two uniform numbers is uniform, and so is the minimum below it
    torch.testing.assert_close(t.square().sort().values, torch.linspace(0, 1, len(t)), atol=0.02, rtol=0)
    general = (s < t) & (s > 0)
    share = (s / t)[general].sort().values
    torch.testing.assert_close(share, torch.linspace(0, 1, len(share)), atol=0.03, rtol=0)
    assert abs(float(general.float().mean()) - 0.4) < 0.02


def check_velocity_errors() -> None:
    """Of a two-time map on and off the diagonal, and of a map to 0 on both paths, whose prediction has a velocity."""
    network, flow_map = two_time()
    state = _state()
    batch = noised(state, flow_map, Noising(2, diagonal=0.5), seed=1, objective="o")
    rows = batch.rows
    expected = network(rows["x_t"], rows["t"], rows["s"], batch.cond) - rows["target"]
    assert torch.equal(velocity_error(flow_map, batch), expected)
    diagonal = noised(state, flow_map, Noising(2), seed=1, objective="o")
    t = diagonal.rows["t"]
    expected = network(diagonal.rows["x_t"], t, t, batch.cond) - diagonal.rows["target"]
    assert torch.equal(velocity_error(flow_map, diagonal), expected)
    single, endpoint = single_time()
    at_zero = noised(state, endpoint, Noising(2, min_time=0.1), seed=1, objective="o")
    t, x_t = at_zero.rows["t"], at_zero.rows["x_t"]
    eps = (x_t - (1 - t)[:, None, None] * at_zero.rows["target"]) / t[:, None, None]
    expected = single(x_t, t, at_zero.cond) - (eps - at_zero.rows["target"])
    torch.testing.assert_close(velocity_error(endpoint, at_zero), expected, **CLOSE)
    # an error of the sample is one of the velocity `cos eps - sin x_0` divided by the sine
    trig = TrigFlowMap(lambda x, t, cond: 0.5 * x)
    batch = noised(state, trig, Noising(2, min_time=0.1), seed=1, objective="o")
    jumped = trig.jump(batch.rows["x_t"], batch.rows["t"], torch.zeros(48), batch.cond)
    sine = trig.path.sigma(batch.rows["t"])[:, None, None]
    torch.testing.assert_close(velocity_error(trig, batch), (batch.rows["target"] - jumped) / sine, **CLOSE)


def check_derivatives_agree() -> None:
    """Central difference, forward mode and the closed form; one-sided at the ends, nothing on the diagonal."""

    def network(x: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
        calls.append((x, t, s))
        return torch.sin(2 * x) * t[:, None, None] + (s * t.square())[:, None, None]

    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    flow_map = TwoTimeMap(network, LinearPath())
    batch = noised(_state(), flow_map, Noising(4, diagonal=0.4, to_data=0.3), seed=2, objective="o")
    t, s = batch.rows["t"].clone(), batch.rows["s"].clone()
    off = (s < t).nonzero().squeeze(1)
    # at the noise end, and so close to the diagonal that the difference is cut there
    t[off[0]], s[off[1]] = 1.0, t[off[1]] - 1e-3
    inner = (t - s > 0.005) & (t < 0.995)
    batch = batch.with_rows(t=t, s=s)
    x, v = batch.rows["x_t"], batch.rows["target"]
    t_, s_ = t[:, None, None], s[:, None, None]
    exact = (t_ - s_) * (2 * torch.cos(2 * x) * v * t_ + torch.sin(2 * x) + 2 * s_ * t_)
    forward = shared_correction(flow_map, batch, "jvp", 5e-3)
    torch.testing.assert_close(forward, exact, **CLOSE)
    calls.clear()
    central = shared_correction(flow_map, batch, "central", 5e-3)
    assert [len(moved) for moved, _, _ in calls] == [len(off)] * 2
    for moved, at, target in calls:
        # both ends lie on the path, and within [s, 1]
        torch.testing.assert_close(moved, x[off] + (at - t[off])[:, None, None] * v[off], rtol=0, atol=1e-5)
        assert bool(((at >= target) & (at <= 1)).all())
    torch.testing.assert_close(central[inner], exact[inner], rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(central, exact, rtol=0.05, atol=0.05)
    assert central[s == t].eq(0).all()
    assert forward[s == t].eq(0).all()
    # the error of a central difference falls with the square of its step
    wide, narrow = (shared_correction(flow_map, batch, "central", h)[inner] - exact[inner] for h in (0.08, 0.04))
    far = ((t - s > 0.08) & (t < 0.92))[inner]
    assert 3.7 < float(wide[far].norm() / narrow[far].norm()) < 4.3
    diagonal = batch.with_rows(s=t)
    calls.clear()
    assert shared_correction(flow_map, diagonal, "central", 5e-3).eq(0).all()
    # processes that share a network make the same calls
    assert [len(moved) for moved, _, _ in calls] == [1, 1]


def check_nft_closed_form() -> None:
    """The value after a known step, and before it the gradient `2 A sigma^2 e / (w d)`, whatever beta."""
    sigma = torch.tensor([0.2, 0.5, 0.9])
    for beta in (0.1, 1.0):
        objective = _objective("diffusion-nft", nft_beta=beta, kl_beta=0.0)
        errors = _errors()
        weight = sigma * errors.old.abs().mean(1)
        expected = (2 * ADVANTAGE * sigma.square() / weight / 2)[:, None] * errors.old
        torch.testing.assert_close(_slope(objective, errors), expected, **CLOSE)
    objective = _objective("diffusion-nft", nft_beta=0.5, kl_beta=0.1, adv_clip_max=4.0)
    losses = objective._by_row(_errors(0.2))
    # row 0, by hand: v+- = v_old +- 0.5 (0.2, 0.4), so errors (.4, -.3) and (.2, -.7); r = 1.5 / 8 + .5
    good, bad = 0.2 * (0.16 + 0.09) / 2 / 0.35, 0.2 * (0.04 + 0.49) / 2 / 0.45
    expected_0 = 4 / 0.5 * (0.6875 * good + 0.3125 * bad) + 0.1 * (0.1**2 + 0.4**2) / 2
    torch.testing.assert_close(losses[0], torch.tensor(expected_0), **CLOSE)
    # an advantage beyond the clip counts as the clip
    beyond = _errors(0.2)._replace(advantage=torch.tensor([9.0, -9.0, 0.5]))
    at = beyond._replace(advantage=torch.tensor([4.0, -4.0, 0.5]))
    assert torch.equal(objective._by_row(beyond), objective._by_row(at))


def check_meanflow_nft_is_nft_on_the_induced_velocity() -> None:
    """With `V = u + (t - s)(scale v + 0.3)` for policy, old and base, whose correction is the old one's."""
    network, _ = two_time()
    views = policies(network)
    with torch.no_grad():
        network.scale += 0.2
    for derivative in ("central", "jvp"):
        objective = _objective("meanflow-nft", derivative=derivative, kl_beta=0.3)
        batch = objective.prepare(_state(), views, seed=1)
        x, t, s, v, a = (batch.rows[name] for name in ("x_t", "t", "s", "target", "advantage"))

        def velocity(own: object, x: Tensor = x, t: Tensor = t, s: Tensor = s, v: Tensor = v) -> Tensor:
            old = views.old.network  # type: ignore[attr-defined]
            u: Tensor = own(x, t, s, batch.cond)  # type: ignore[operator]  # noqa: B023
            return u + (t - s)[:, None, None] * (old.scale * v + 0.3)

        new, old, base = (velocity(m) for m in (network, views.old.network, views.reference.network))  # type: ignore[attr-defined]
        x_0, terms = x - t[:, None, None] * v, []
        for sign in (1, -1):
            predicted = x - t[:, None, None] * (old + sign * 0.1 * (new - old))
            weight = (predicted - x_0).abs().mean((1, 2)).detach()
            terms.append((predicted - x_0).square().mean((1, 2)) / weight)
        r = (a / 10 + 0.5).clamp(0, 1)
        by_row = 50 * (r * terms[0] + (1 - r) * terms[1]) + 0.3 * (new - base).square().mean((1, 2))
        loss = objective.loss(views, batch)
        torch.testing.assert_close(loss.total, by_row.mean(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(loss.parts["old_distance"], (new - old).square().mean(), **CLOSE)
        network.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        ours = network.scale.grad
        (theirs,) = torch.autograd.grad(by_row.mean(), network.scale)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def check_mean_flow_advantage_closed_form() -> None:
    """Its value by hand, and no gradient at the minimiser `(A ubar + gamma u_old + lambda u_ref) / (A + ...)`."""
    objective = _objective("mean-flow-advantage", old_weight=3.0, base_weight=0.5)
    losses = objective._by_row(_errors(0.2))
    # row 0: e = (.5, -.1), e - e_old = (.2, .4), e - e_base = (.1, .4), t = .2
    terms = 1.5 * (0.25 + 0.01) / 2 + 3 * (0.04 + 0.16) / 2 + 0.5 * (0.01 + 0.16) / 2
    torch.testing.assert_close(losses[0], torch.tensor(0.2**2 * terms / (0.2 * 0.3)), **CLOSE)
    errors = _errors()
    # in errors, ubar is 0
    weights = (ADVANTAGE + 3.5)[:, None]
    best = ((3.0 * errors.old + 0.5 * errors.base) / weights).requires_grad_()
    torch.testing.assert_close(_slope(objective, errors._replace(new=best)), torch.zeros(3, 2), atol=1e-6, rtol=0)
    # at the old policy it points where MeanFlowNFT's does
    one = _slope(_objective("mean-flow-advantage", base_weight=0.0, adv_clip_max=1.0), _errors())
    other = _slope(_objective("meanflow-nft", kl_beta=0.0), _errors())
    torch.testing.assert_close(one, other, **CLOSE)


def check_awm_closed_form() -> None:
    """Ratio and gradient of each weighting; before a step the gradient is `A` times that of the weighted error."""
    for weighting, weigh in {
        "uniform": lambda square, t: square,
        "t": lambda square, t: t * square,
        "t2": lambda square, t: t.square() * square,
        "ghuber": lambda square, t: t * 4 * (square + 1e-10) ** 0.25,
    }.items():
        objective = _objective("awm", weighting=weighting, kl_beta=0.2, clip_range=0.01)
        errors = _errors(0.02)
        new, old = (weigh(e.square().mean(1), errors.t) for e in (errors.new, errors.old))
        ratio, a = (old - new).exp(), ADVANTAGE / 5
        expected = -torch.minimum(ratio * a, ratio.clamp(0.99, 1.01) * a)
        expected = expected + 0.2 * (errors.new - errors.base).square().mean(1)
        torch.testing.assert_close(objective._by_row(errors), expected, **CLOSE)
        at_old = _errors()
        (theirs,) = torch.autograd.grad((a * weigh(at_old.new.square().mean(1), at_old.t)).sum(), at_old.new)
        slope = _slope(_objective("awm", weighting=weighting, kl_beta=0.0), at_old)
        torch.testing.assert_close(slope, theirs, **CLOSE)


def check_samples_decide_the_direction() -> None:
    """One step against the gradient lowers the error of preferred samples more than that of the others."""
    for name in ("diffusion-nft", "meanflow-nft", "mean-flow-advantage", "awm"):
        for make in (two_time, single_time):
            kind = TwoTimeMap if make is two_time else SingleTimeMap
            if kind is SingleTimeMap and name.startswith("mean"):
                continue
            network = make()[0]
            views, objective, state = policies(network, kind), _objective(name), _state()
            batch = objective.prepare(state, views, seed=1)
            objective.loss(views, batch).total.backward()  # type: ignore[no-untyped-call]
            before = _weighted_error(views, batch)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.01 * parameter.grad
            assert _weighted_error(views, batch) < before - 1e-6, name


@torch.no_grad()
def _weighted_error(views: ToyPolicies, batch: Batch) -> float:
    error = velocity_error(views.current, batch).square().mean((1, 2)) * batch.rows["t"]
    return float((batch.rows["advantage"] * error).mean())


def check_base_and_old_are_evaluated_once() -> None:
    """Calls of each policy's network in one loss: as many as a plan counts."""
    network = two_time()[0]
    views = policies(network)
    objective = _objective("meanflow-nft", diagonal=0.5, to_data=0.25)
    batch = objective.prepare(_state(), views, seed=1)
    objective.loss(views, batch)
    old: Network = views.old.network  # type: ignore[attr-defined]
    base: Network = views.reference.network  # type: ignore[attr-defined]
    assert (network.calls, old.calls, base.calls) == (1, 3, 1)
    # the two of the difference see the half of the rows that is not diagonal
    assert MeanFlowNftConfig().frozen_calls(1) == 2 + 2 * 0.5
    assert MeanFlowNftConfig(kl_beta=0.0).frozen_calls(1) == 1 + 2 * 0.5


def check_dppo_mask() -> None:
    """Rows at the limit have no gradient where a step would carry them further out, by the sign of each advantage."""
    cases = (  # KL, ratio, advantage, slope of the loss in the ratio
        (0.9, 1.5, 2.0, -2.0),
        (1.0, 1.5, 2.0, 0.0),
        (2.0, 1.5, -2.0, 2.0),
        (2.0, 0.5, -2.0, 0.0),
        (2.0, 0.5, 2.0, -2.0),
        (2.0, 1.0, 2.0, -2.0),
    )
    kl, value, advantage, slope = (torch.tensor(column) for column in zip(*cases, strict=True))
    ratio = value.clone().requires_grad_()
    loss, masked = masked_surrogate(ratio, advantage, kl, 1.0)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(ratio.grad, slope)  # type: ignore[arg-type]
    torch.testing.assert_close(loss.detach(), slope * value)
    assert masked.tolist() == [x == 0 for x in slope.tolist()]
    # siblings share their row's KL, and differ by their ratios
    _, masked = masked_surrogate(torch.tensor([[1.5, 0.5]] * 2), torch.ones(2, 2), torch.tensor([2.0, 0.5]), 1.0)
    assert masked.tolist() == [[True, False], [False, False]]
    # as an option, with the KL that is logged
    network, flow_map = two_time()
    views, result = policies(network), drawn(flow_map)
    objective = Grpo(GrpoConfig(kl_mask=1e-6, clip_range=1e-4)).bind(stochasticizer())
    batch = objective.prepare(scored(result, preference(result)), views, seed=0)
    assert float(objective.loss(views, batch).parts["clip_frac"]) == 0
    with torch.no_grad():
        network.shift += 0.05
    loss = objective.loss(views, batch)
    assert float(loss.parts["approx_kl"]) > 1e-6
    assert 0.1 < float(loss.parts["clip_frac"]) < 0.9
    assert torch.equal(
        objective.loss(views, batch).total,
        Grpo(GrpoConfig(kl_mask=1e-6)).bind(stochasticizer()).loss(views, batch).total,
    )


def check_reinforce_is_the_first_gradient_of_grpo() -> None:
    """With the mean of the others as the baseline: `m / (m - 1)` times that of the group's mean."""
    network, flow_map = two_time()
    views, result = policies(network), drawn(flow_map)
    state = scored(result, preference(result))
    gradients = []
    for name in ("reinforce", "grpo"):
        objective = objectives.build(name).bind(stochasticizer())
        batch = objective.prepare(state, views, seed=0)
        network.zero_grad()
        objective.loss(views, batch).total.backward()
        assert network.scale.grad is not None
        gradients.append(network.scale.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1] * 6 / 5, **CLOSE)
    rewards = torch.tensor([1.0, 0.0, 5.0, 2.0, 4.0])
    groups = torch.tensor([0, 0, 1, 1, 1])
    others = torch.tensor([0.0, 1.0, 3.0, 4.5, 3.5])
    plain = ScoredRollout(
        SampleRollout(result.cond.select(torch.arange(5)), groups, result.x0[:5], result.grid),
        RewardOutput(rewards, {}),
        rewards - torch.tensor([0.5, 0.5, 11 / 3, 11 / 3, 11 / 3]),
    )
    torch.testing.assert_close(objectives.build("reinforce").advantages(plain), rewards - others)
