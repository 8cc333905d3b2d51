from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from torch import nn

from fmg.core.errors import CheckpointError, MissingDependencyError, UsageError
from fmg.registry import optimizers

NAMES = ("adafactor", "adamw", "muon", "sgd")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator)
    y = torch.randn(32, 4, generator=generator)
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("name", NAMES)
def test_descends_and_moves_every_parameter(name: str) -> None:
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = optimizers.build(name, {"lr": 0.02})(model.named_parameters())
    first = descend(model, optimizer, 1)
    assert descend(model, optimizer, 60) < 0.9 * first
    assert all(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_resumes_from_its_state_as_if_never_stopped(name: str) -> None:
    model = network()
    optimizer = optimizers.build(name, {"lr": 0.01})(model.named_parameters())
    descend(model, optimizer, 3)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    descend(model, optimizer, 3)
    other = network()
    other.load_state_dict(weights)
    resumed = optimizers.build(name, {"lr": 0.5})(other.named_parameters())
    resumed.load_state_dict(state)
    descend(other, resumed, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adamw_takes_every_option() -> None:
    options = {"lr": 0.1, "betas": [0.5, 0.6], "eps": 1e-3, "weight_decay": 0.2}
    ours, theirs = network(), network()
    descend(ours, optimizers.build("adamw", options)(ours.named_parameters()), 4)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.2)
    descend(theirs, reference, 4)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    (group,) = optimizers.build("adamw")(ours.named_parameters()).param_groups
    assert tuple(group["betas"]) == (0.9, 0.99)


def test_muon_is_muon_on_matrices_and_adamw_on_the_rest() -> None:
    ours, theirs = network(), network()
    descend(ours, optimizers.build("muon", {"lr": 0.01, "weight_decay": 0.1})(ours.named_parameters()), 4)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(vectors, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=generator), torch.randn(32, 4, generator=generator)
    for _ in range(4):
        theirs.zero_grad()
        (theirs(x) - y).square().mean().backward()
        muon.step()
        adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_schedules_reach_both_parts_of_muon_also_after_loading() -> None:
    model = network()
    optimizer = optimizers.build("muon", {"lr": 0.01})(model.named_parameters())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    start = [p.detach().clone() for p in model.parameters()]
    descend(model, optimizer, 2)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


def test_muon_on_matrices_alone_and_its_closure() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = optimizers.build("muon")([("weight", weight)])
    calls: list[int] = []

    def closure() -> float:
        calls.append(1)
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 9.0
    assert calls == [1]


def test_state_of_another_optimizer_is_refused() -> None:
    model = network()
    adamw = optimizers.build("adamw")(model.named_parameters())
    with pytest.raises(CheckpointError, match="Resume with the optimizer"):
        optimizers.build("muon")(model.named_parameters()).load_state_dict(adamw.state_dict())


@pytest.mark.parametrize(
    ("name", "options"),
    [("adamw", {"lr": 0}), ("adamw", {"betas": [0.9, 1.0]}), ("sgd", {"momentum": 1}), ("muon", {"adjust_lr": "x"})],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        optimizers.build(name, options)


def test_8bit_moments_need_bitsandbytes_before_any_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match="pip install bitsandbytes"):
        optimizers.build("adamw8bit")


def test_8bit_options_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wiring only: a fake module replaces bitsandbytes, whose kernels are not run here."""
    given: dict[str, object] = {}

    def adamw8bit(parameters: list[nn.Parameter], **options: object) -> torch.optim.Optimizer:
        given.update(options, count=len(parameters))
        return torch.optim.AdamW(parameters, lr=float(str(options["lr"])))

    library = types.ModuleType("bitsandbytes")
    library.optim = types.SimpleNamespace(AdamW8bit=adamw8bit)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    model = network()
    optimizer = optimizers.build("adamw8bit", {"lr": 0.02, "eps": 1e-6})(model.named_parameters())
    assert given == {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 1e-4, "count": 4}
    assert descend(model, optimizer, 20) < 0.95 * descend(network(), torch.optim.SGD(network().parameters(), 0.0), 1)
