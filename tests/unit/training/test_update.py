"""Updates and gates on a network whose gradients do not depend on batching."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fmg.core.errors import GateError
from fmg.core.events import Event, Notice
from fmg.core.protocols import Density, FlowMap
from fmg.core.types import Batch, Conditioning
from fmg.flow import Gaussian
from fmg.recipe.sections import TrainSection
from fmg.rl.configs import GrpoConfig
from fmg.rl.grpo import Grpo
from fmg.training.distributed import DistContext
from fmg.training.evaluator import averaged_keys
from fmg.training.gates import IDLE_ITERATIONS, LearningGate, ReplayGate, movement, movement_gate
from fmg.training.lr_schedule import LrSchedule
from fmg.training.update import Ema, Updater, partition
from tests.support import toy


def prepared(clip_range: float = 1e-4) -> tuple[toy.Network, toy.ToyPolicies, Grpo, Batch]:
    network, flow_map = toy.two_time()
    policies = toy.policies(network)
    drawn = toy.drawn(flow_map)
    objective = Grpo(GrpoConfig(clip_range=clip_range)).bind(toy.stochasticizer())
    return network, policies, objective, objective.prepare(toy.scored(drawn, toy.preference(drawn)), policies, 0)


def updater(network: toy.Network, policies: toy.ToyPolicies, objective: Grpo, micro_batch: int, lr: float) -> Updater:
    parameters = list(network.parameters())
    return Updater(objective, policies, torch.optim.SGD(parameters, lr=lr), parameters, 1.0, micro_batch)


def test_partition_is_a_seeded_disjoint_cover_of_the_rows() -> None:
    batch = prepared()[3]
    marked = batch.with_rows(mark=torch.arange(len(batch)))
    parts = [part.rows["mark"].tolist() for part in partition(marked, 5, seed=3)]
    assert sorted(row for part in parts for row in part) == list(range(len(batch)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == [part.rows["mark"].tolist() for part in partition(marked, 5, seed=3)]
    assert parts != [part.rows["mark"].tolist() for part in partition(marked, 5, seed=4)]


@pytest.mark.parametrize("micro_batch", [1, 5, 7, 1000])
def test_an_update_does_not_depend_on_the_micro_batch(micro_batch: int) -> None:
    after = []
    for size in (72, micro_batch):
        network, policies, objective, batch = prepared()
        updater(network, policies, objective, size, lr=0.5).update(batch)
        after.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    torch.testing.assert_close(after[0], after[1], rtol=1e-6, atol=1e-7)


def test_every_update_has_the_rate_of_its_place_in_the_run_also_after_skipped_ones() -> None:
    network, policies, objective, batch = prepared()
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    train = TrainSection(lr_schedule="linear", iterations=3, updates_per_iteration=2)
    schedule = LrSchedule(optimizer, train)
    scheduled = Updater(objective, policies, optimizer, parameters, 1.0, 72, schedule=schedule)
    rates: list[list[float]] = []
    for iteration, kl_limit in enumerate([None, 0.0, None]):
        rates.append([])
        for _ in scheduled.updates(batch, 2, iteration, kl_limit, first=2 * iteration):
            rates[-1].append(optimizer.param_groups[0]["lr"])
    # the second iteration stops after its first update
    assert rates == [[pytest.approx(0.5 * left / 6) for left in part] for part in ([6, 5], [4], [2, 1])]


def test_a_small_step_raises_the_surrogate() -> None:
    network, policies, objective, batch = prepared(clip_range=0.5)
    before = float(objective.loss(policies, batch).total.detach())
    updater(network, policies, objective, 24, lr=1e-3).update(batch)
    assert float(objective.loss(policies, batch).total.detach()) < before


def test_the_kl_that_is_logged_is_the_one_after_the_step() -> None:
    network, policies, objective, batch = prepared()
    assert updater(network, policies, objective, 24, lr=0.5).update(batch)["approx_kl"] > 0
    network, policies, objective, batch = prepared()
    assert updater(network, policies, objective, 24, lr=0.0).update(batch)["approx_kl"] == 0


def test_a_gradient_that_is_not_finite_stops_the_run_and_leaves_the_weights() -> None:
    network, policies, objective, batch = prepared()
    before = [p.detach().clone() for p in network.parameters()]
    broken = batch.with_rows(advantage=torch.full_like(batch.rows["advantage"], float("inf")))
    with pytest.raises(GateError, match="not finite"):
        updater(network, policies, objective, 24, lr=0.1).update(broken)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


class NoisyReplay:
    """A stochasticizer whose mean changes by `size` at every second call: a rollout that the update cannot replay."""

    path_preserving = False

    def __init__(self, size: float, lasting: bool) -> None:
        self.size, self.lasting, self.calls = size, lasting, 0

    def transition(self, flow_map: FlowMap, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Density:
        self.calls += 1
        exact = toy.stochasticizer().transition(flow_map, x_t, t, s, cond)
        shift = self.size * (self.calls if self.lasting else 1)
        return Gaussian(exact.mean + shift, exact.std)


def gate(stochasticizer: object, policies: toy.ToyPolicies, heard: list[Event], *, always: bool = False) -> ReplayGate:
    return ReplayGate(
        stochasticizer,  # type: ignore[arg-type]
        policies,
        clip_range=1e-4,
        micro_batch=24,
        always_recompute=always,
        observer=heard.append,
        dist=DistContext(),
    )


def test_an_exact_replay_passes_and_keeps_the_rollouts_log_probs() -> None:
    _, policies, _, batch = prepared()
    heard: list[Event] = []
    checked = gate(toy.stochasticizer(), policies, heard)
    assert checked.admit(batch) is batch
    assert checked.admit(batch) is batch
    assert isinstance(heard[0], Notice)
    assert "taken from the rollout" in heard[0].text


def test_a_rollout_of_other_rounding_is_recomputed_through_the_update_path_ever_after() -> None:
    _, policies, _, batch = prepared()
    heard: list[Event] = []
    noisy = NoisyReplay(1e-3, lasting=False)
    checked = gate(noisy, policies, heard)
    fresh = checked.admit(batch)
    assert not torch.equal(fresh.rows["log_prob_old"], batch.rows["log_prob_old"])
    checked.admit(batch)
    assert isinstance(heard[0], Notice)
    assert "recomputed" in heard[0].text
    calls = noisy.calls
    checked.admit(batch)
    assert noisy.calls > calls


def test_a_replay_that_only_a_trained_adapter_breaks_stops_the_second_rollout() -> None:
    """A fresh LoRA adds exactly nothing, so dropout on it cannot be seen before the first update."""
    _, policies, _, batch = prepared()
    noisy = NoisyReplay(0.0, lasting=True)
    checked = gate(noisy, policies, [])
    checked.admit(batch)
    noisy.size = 1e-3
    with pytest.raises(GateError, match="tenth of the clip range"):
        checked.admit(batch)


def test_a_replay_that_never_agrees_stops_the_run() -> None:
    _, policies, _, batch = prepared()
    with pytest.raises(GateError, match="tenth of the clip range"):
        gate(NoisyReplay(1e-3, lasting=True), policies, []).admit(batch)


def heard_of(steps: list[tuple[int, int]], iterations: int) -> list[str]:
    """Warnings of a run whose iterations each end with (iterations done, the last that made an update)."""
    heard: list[Event] = []
    learning = LearningGate(heard.append)
    for done, touched in steps:
        learning.iteration(done, touched, last=done == iterations)
    return [event.text for event in heard if isinstance(event, Notice)]


def test_the_first_iteration_without_an_update_is_reported_and_a_run_without_any_fails() -> None:
    (warning,) = heard_of([(1, 0), (2, 0), (3, 3)], 4)
    assert warning.startswith("Iteration 1 made no update: in every group the rewards were equal")
    with pytest.raises(GateError, match=r"The run made no update: .* \(4 so far\)"):
        heard_of([(done, 0) for done in range(1, 5)], 4)


def test_a_run_that_never_learns_is_stopped_early_and_one_that_did_is_warned() -> None:
    with pytest.raises(GateError, match=rf"\({IDLE_ITERATIONS} so far\)"):
        heard_of([(done, 0) for done in range(1, 100)], 99)
    rest = [(done, 1) for done in range(2, 30)]
    (warning,) = heard_of([(1, 1), *rest], 29)
    assert warning.startswith(f"The last {IDLE_ITERATIONS} iterations made no update")
    assert heard_of([(done, done - done % 3) for done in range(3, 30)], 29) == []


def test_an_adapter_that_did_not_move_stops_the_run() -> None:
    network, policies, objective, batch = prepared()
    named = list(network.named_parameters())
    start = {name: p.detach().clone() for name, p in named}
    updater(network, policies, objective, 24, lr=0.0).update(batch)
    with pytest.raises(GateError, match="did not move"):
        movement_gate(movement(start, named))
    updater(network, policies, objective, 24, lr=0.1).update(batch)
    movement_gate(movement(start, named))
    for distance in (math.nan, math.inf):
        with pytest.raises(GateError, match="not finite"):
            movement_gate(distance)


def _walk(parameter: nn.Parameter, ema: Ema, steps: int) -> list[torch.Tensor]:
    values = []
    for step in range(steps):
        with torch.no_grad():
            parameter.add_(torch.full_like(parameter, 1.0 + step))
        ema.update()
        values.append(parameter.detach().clone())
    return values


def test_the_average_is_that_of_its_formula_with_warm_up() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = Ema([parameter], 0.5)
    expected = parameter.detach().clone()
    for n, value in enumerate(_walk(parameter, ema, 12), start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert torch.allclose(ema.values[0], expected, rtol=1e-6)


def test_a_late_average_is_not_the_first_weights() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    ema = Ema([parameter], 0.999)
    with torch.no_grad():
        parameter.fill_(1.0)
    for _ in range(30):
        ema.update()
    # without a warm-up it would still be 0.03
    assert float(ema.values[0]) > 0.9


def test_the_weights_come_back_bit_for_bit() -> None:
    parameter = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    ema = Ema([parameter], 0.9)
    _walk(parameter, ema, 3)
    weights, average = parameter.detach().clone(), ema.values[0].clone()
    with ema.in_place():
        assert torch.equal(parameter.detach(), average)
    assert torch.equal(parameter.detach(), weights)
    assert torch.equal(ema.values[0], average)


def test_a_restored_average_continues_as_if_never_stopped() -> None:
    whole, cut = (nn.Parameter(torch.tensor([1.0, 3.0])) for _ in range(2))
    one, two = Ema([whole], 0.9), Ema([cut], 0.9)
    _walk(whole, one, 4)
    _walk(cut, two, 4)
    again = Ema([cut], 0.9)
    again.restore([x.clone() for x in two.values], two.updates)
    _walk(whole, one, 4)
    _walk(cut, again, 4)
    assert torch.equal(one.values[0], again.values[0])


def test_keys_of_an_average_stand_beside_those_of_the_weights() -> None:
    metrics = {"eval/score": 0.5, "eval/score_se": 0.1, "time/eval_s": 3.0}
    assert averaged_keys(metrics) == {"eval_ema/score": 0.5, "eval_ema/score_se": 0.1}
