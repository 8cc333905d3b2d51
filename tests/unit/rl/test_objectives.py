from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fmg.conformance.toys import SingleTimeNetwork
from fmg.core.errors import CompositionError, UsageError
from fmg.core.types import Conditioning, RewardOutput, SampleRollout, ScoredRollout
from fmg.flow import LinearPath, SingleTimeMap, TrigPath, TwoTimeMap
from fmg.registry import objectives
from fmg.rl.configs import GrpoConfig, RwfmConfig
from fmg.rl.grpo import Grpo
from fmg.rl.rwfm import RewardWeightedFlowMatching
from fmg.training.update import Ema
from tests.support.toy import ToyPolicies, drawn, policies, preference, scored, stochasticizer, two_time


def test_equal_rewards_everywhere_give_an_empty_batch() -> None:
    network, flow_map = two_time()
    result = drawn(flow_map)
    state = scored(result, [0.1] * 24)
    for objective in (Grpo(GrpoConfig()), RewardWeightedFlowMatching(RwfmConfig())):
        batch = objective.prepare(state, policies(network), seed=0)
        assert len(batch) == 0
        assert list(batch.split(8)) == []


def test_a_group_with_equal_rewards_adds_exactly_nothing_to_the_gradient() -> None:
    gradients = []
    for groups in (3, 4):
        network, flow_map = two_time()
        result = drawn(flow_map, groups=groups)
        advantages = torch.zeros(groups * 6)
        advantages[:18] = preference(result)[:18]
        state = ScoredRollout(result, RewardOutput(advantages, {}), advantages)
        objective = Grpo(GrpoConfig()).bind(stochasticizer())
        views = policies(network)
        objective.loss(views, objective.prepare(state, views, seed=0)).total.backward()
        gradients.append(network.scale.grad)
    assert torch.equal(*gradients)


def test_zero_advantages_give_exactly_zero_gradient() -> None:
    network, flow_map = two_time()
    result = drawn(flow_map)
    objective = Grpo(GrpoConfig()).bind(stochasticizer())
    views = policies(network)
    batch = objective.prepare(scored(result, preference(result)), views, seed=0)
    still = batch.with_rows(advantage=torch.zeros_like(batch.rows["advantage"]))
    objective.loss(views, still).total.backward()
    assert network.scale.grad is not None
    assert network.shift.grad is not None
    assert network.scale.grad.eq(0).all()
    assert network.shift.grad.eq(0).all()


def test_batch_is_transition_major_and_its_rows_belong_together() -> None:
    network, flow_map = two_time()
    result = drawn(flow_map)
    rewards = preference(result)
    rewards[6:12] = 0.25
    state = scored(result, rewards)
    batch = Grpo(GrpoConfig()).prepare(state, policies(network), seed=0)
    kept = [i for i in range(24) if not 6 <= i < 12]
    assert len(batch) == 3 * 18
    assert batch.rows["step"].tolist() == [0] * 18 + [1] * 18 + [2] * 18
    assert batch.cond.prompts == tuple(result.cond.prompts[i] for i in kept) * 3
    for k, step in enumerate(result.transitions):
        rows = slice(18 * k, 18 * (k + 1))
        for name, recorded in {
            "x_t": step.x_t,
            "x_s": step.x_s,
            "mean_old": step.mean,
            "std": step.std,
            "t": step.t,
            "s": step.s,
            "log_prob_old": step.log_prob,
            "advantage": state.advantages,
        }.items():
            assert torch.equal(batch.rows[name][rows], recorded[kept]), name


def test_micro_batches_add_up_to_the_whole() -> None:
    network, flow_map = two_time()
    result = drawn(flow_map)
    objective = Grpo(GrpoConfig(kl_beta=0.1)).bind(stochasticizer())
    views = policies(network)
    batch = objective.prepare(scored(result, preference(result)), views, seed=0)
    with torch.no_grad():
        network.shift += 0.01
    whole = objective.loss(views, batch)
    parts = [(len(part) / len(batch), objective.loss(views, part)) for part in batch.split(17)]
    torch.testing.assert_close(whole.total, torch.stack([share * loss.total for share, loss in parts]).sum())
    torch.testing.assert_close(
        whole.parts["approx_kl"], torch.stack([share * loss.parts["approx_kl"] for share, loss in parts]).sum()
    )


def test_grpo_raises_the_probability_of_preferred_samples() -> None:
    network, flow_map = two_time()
    objective = Grpo(GrpoConfig(clip_range=0.05)).bind(stochasticizer())
    views = policies(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    means = []
    for iteration in range(15):
        result = drawn(flow_map, groups=8, size=8, seed=iteration)
        rewards = preference(result)
        means.append(float(rewards.mean()))
        batch = objective.prepare(scored(result, rewards), views, seed=0)
        optimizer.zero_grad()
        objective.loss(views, batch).total.backward()
        optimizer.step()
    assert means[-1] > means[0] + 0.1


def test_rwfm_moves_the_diagonal_towards_preferred_samples() -> None:
    network, flow_map = two_time()
    objective = RewardWeightedFlowMatching(RwfmConfig(temperature=0.3))
    views = policies(network)
    result = drawn(flow_map, groups=8, size=8)
    state = scored(result, preference(result))
    batch = objective.prepare(state, views, seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = objective.loss(views, batch).total
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_rwfm_takes_rollouts_without_transitions_and_keys_its_noise() -> None:
    network, flow_map = two_time()
    result = drawn(flow_map)
    plain = SampleRollout(result.cond, result.groups, result.x0, result.grid)
    state = scored(result, preference(result))
    objective = RewardWeightedFlowMatching(RwfmConfig()).bind(stochasticizer())
    views = policies(network)
    rows = objective.prepare(ScoredRollout(plain, state.rewards, state.advantages), views, seed=4).rows
    assert torch.equal(rows["x_t"], objective.prepare(state, views, seed=4).rows["x_t"])
    assert not torch.equal(rows["x_t"], objective.prepare(state, views, seed=5).rows["x_t"])
    assert len({value.item() for value in rows["t"]}) == len(rows["t"])
    # what a plan counts
    assert len(rows["t"]) == len(plain.groups) * RwfmConfig().rows_per_sample(transitions=0)


def test_misuse_is_explained() -> None:
    network, flow_map = two_time()
    result = drawn(flow_map)
    state = scored(result, preference(result))
    views = policies(network)
    unbound = Grpo(GrpoConfig())
    with pytest.raises(CompositionError, match="bind"):
        unbound.loss(views, unbound.prepare(state, views, seed=0))
    plain = SampleRollout(result.cond, result.groups, result.x0, result.grid)
    with pytest.raises(CompositionError, match="without transition densities"):
        unbound.prepare(ScoredRollout(plain, state.rewards, state.advantages), views, seed=0)
    trig = TwoTimeMap(network, TrigPath())
    with pytest.raises(CompositionError, match="'trig'"):
        RewardWeightedFlowMatching(RwfmConfig()).prepare(state, ToyPolicies(trig, trig, trig), seed=0)


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def test_a_network_without_a_forward_mode_derivative_is_refused_by_name() -> None:
    network, flow_map = two_time()
    state = scored(drawn(flow_map), preference(drawn(flow_map)))

    def plain(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        moved: torch.Tensor = _NoForwardMode.apply(network(x, t, s, cond))  # type: ignore[no-untyped-call]
        return moved

    views = ToyPolicies(flow_map, TwoTimeMap(plain, LinearPath()), flow_map)
    for derivative in ("central", "jvp"):
        objective = objectives.build("meanflow-nft", {"derivative": derivative})
        batch = objective.prepare(state, views, seed=0)
        if derivative == "central":
            assert objective.loss(views, batch).total.isfinite()
            continue
        with pytest.raises(CompositionError, match=r"no forward-mode derivative.*Set objective.derivative to central"):
            objective.loss(views, batch)


@pytest.mark.parametrize("name", ["meanflow-nft", "mean-flow-advantage"])
def test_average_velocities_are_refused_of_a_map_to_0(name: str) -> None:
    state = scored(drawn(two_time()[1]), preference(drawn(two_time()[1])))
    single = policies(SingleTimeNetwork(), SingleTimeMap)
    with pytest.raises(CompositionError, match=f"'{name}' needs a two-time map"):
        objectives.build(name).prepare(state, single, seed=0)


def test_the_decay_of_the_old_policy_follows_its_schedule() -> None:
    decay = objectives.config("diffusion-nft", {"old_decay_start": 10}).moving_old  # type: ignore[attr-defined]
    assert decay is not None
    assert [decay(n) for n in (1, 10, 60, 1000)] == pytest.approx([0.0, 0.0, 0.05, 0.5])
    decay = objectives.config("meanflow-nft", {"old_decay": 0.9, "old_decay_rise": None}).moving_old  # type: ignore[attr-defined]
    assert decay is not None
    assert decay(1) == decay(500) == 0.9
    assert objectives.config("meanflow-nft", {"old_decay": 0}).moving_old is None  # type: ignore[attr-defined]
    # the average itself
    parameter = torch.nn.Parameter(torch.zeros(1))
    old = Ema([parameter], lambda n: 0.5 if n > 1 else 0.0)
    for value in (2.0, 4.0):
        parameter.data.fill_(value)
        old.update()
    assert float(old.values[0]) == 3.0


def test_registry_builds_them() -> None:
    grpo = objectives.build("grpo", {"clip_range": 1e-3})
    assert (grpo.needs, grpo.clip_range) == ("transitions", 1e-3)
    rwfm = objectives.build("rwfm")
    assert (rwfm.needs, rwfm.clip_range) == ("samples", None)
    for name, options in (("grpo", {"clip_range": 0}), ("grpo", {"kl_beta": -1}), ("rwfm", {"temperature": 0})):
        with pytest.raises(UsageError):
            objectives.build(name, options)


def test_configs_and_run_folders_load_without_torch() -> None:
    modules = "fmg.rl.configs, fmg.rewards.configs, fmg.data.prompt_sets, fmg.data.run_folder, fmg.training.configs"
    code = f"import sys, {modules}, fmg.worlds.configs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
