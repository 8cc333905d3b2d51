"""Learning-rate schedules against diffusers' own loop, and what a run sees of them."""

from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from fmg.core.errors import UsageError
from fmg.recipe import resolve
from fmg.recipe.sections import TrainSection
from fmg.registry import optimizers
from fmg.training.lr_schedule import LrSchedule, lr_factor
from fmg.training.plan import plan

NAMES = ("constant", "linear", "cosine")


def section(name: str, warmup: int, iterations: int = 6, updates: int = 2) -> TrainSection:
    return TrainSection(
        lr_schedule=name,  # type: ignore[arg-type]
        lr_warmup_steps=warmup,
        iterations=iterations,
        updates_per_iteration=updates,
    )


def usual_loop(name: str, warmup: int, total: int, steps: int) -> list[float]:
    """The rates of the loop in diffusers' training scripts: `optimizer.step(); lr_scheduler.step()`."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", NAMES)
def test_without_a_warm_up_the_rates_are_those_of_diffusers_loop(name: str) -> None:
    factor = lr_factor(section(name, 0))
    assert [factor(update) for update in range(12)] == pytest.approx(usual_loop(name, 0, 12, 12), abs=1e-15)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [1, 5, 12])
def test_a_warm_up_is_that_of_diffusers_without_its_first_update_which_moves_nothing(name: str, warmup: int) -> None:
    in_diffusers = "constant_with_warmup" if name == "constant" else name
    factor = lr_factor(section(name, warmup))
    rates = [factor(update) for update in range(12)]
    first, *others = usual_loop(in_diffusers, warmup, 13, 13)
    assert first == 0
    assert rates == others
    assert min(rates) > 0
    assert rates[warmup - 1] == max(rates) == 1


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_warm_up_of_one_update_is_none(name: str) -> None:
    one, none = lr_factor(section(name, 1)), lr_factor(section(name, 0))
    assert [one(update) for update in range(12)] == [none(update) for update in range(12)]
    assert none(11) > none(12) == 0


@pytest.mark.parametrize("warmup", [0, 5, 12])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_plan_states_the_rate_of_the_last_update(name: str, warmup: int) -> None:
    sets = [f"train.lr_schedule={name}", f"train.lr_warmup_steps={warmup}", "train.iterations=6"]
    resolved = resolve(None, {"lr": 0.5}, sets)
    text = plan(resolved).facts["learning rate"]
    last = lr_factor(resolved.recipe.train)(11) * 0.5
    assert text.endswith(f"{name} to {last:.3g} at update 12, the last")
    assert text.startswith("0.5" if warmup == 0 else f"0.5 after a warm-up of {warmup} updates")


def test_a_joint_optimizer_is_scheduled_in_all_its_parts_and_through_a_restored_state() -> None:
    network = nn.Linear(3, 2)
    optimizer = optimizers.build("muon", {"lr": 0.1})(network.named_parameters())
    schedule = LrSchedule(optimizer, section("linear", 0))
    schedule.set(6)
    assert [group["lr"] for group in optimizer.param_groups] == [schedule.rate(6), schedule.rate(6)] == [0.05, 0.05]
    saved = optimizer.state_dict()
    schedule.set(9)
    optimizer.load_state_dict(saved)
    schedule.set(3)
    parts: list[torch.optim.Optimizer] = optimizer.parts  # type: ignore[attr-defined]
    assert [group["lr"] for part in parts for group in part.param_groups] == pytest.approx([0.075, 0.075])


def test_the_default_leaves_the_optimizer_alone() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    before = optimizer.state_dict()
    schedule = LrSchedule(optimizer, section("constant", 0))
    schedule.set(5)
    assert optimizer.state_dict() == before
    assert schedule.rate(5) == 0.3


def test_an_optimizer_without_a_rate_keeps_the_default_and_refuses_a_schedule() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    del optimizer.param_groups[0]["lr"]
    assert LrSchedule(optimizer, section("constant", 0)).rate(0) is None
    with pytest.raises(UsageError, match="has no learning rate"):
        LrSchedule(optimizer, section("cosine", 0))
