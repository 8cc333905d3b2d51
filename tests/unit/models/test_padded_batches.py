from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fmg.core.types import Conditioning, RewardOutput, ScoredRollout
from fmg.flow.grids import make_grid
from fmg.flow.maps import PaddedBatches
from fmg.models.flux.model import FluxModel
from fmg.registry import objectives
from fmg.rl import group_advantages, replay_ratio, rollout
from tests.support import toy


class Recording(toy.Network):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
        assert len(x) == len(t) == len(s) == len(cond)
        self.rows.append(len(x))
        return super().forward(x, t, s, cond)


def _map(rows: int | None) -> tuple[Recording, PaddedBatches]:
    from fmg.flow import LinearPath, TwoTimeMap

    network = Recording()
    return network, PaddedBatches(TwoTimeMap(network, LinearPath()), lambda _: rows)


def _inputs(count: int) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
    x = torch.randn(count, *toy.SHAPE, generator=torch.Generator().manual_seed(0))
    return x, torch.linspace(0.6, 0.9, count), torch.full((count,), 0.3), Conditioning(("a",) * count, {})


@pytest.mark.parametrize(("rows", "given", "called"), [(8, 3, 8), (8, 8, 8), (8, 11, 11), (None, 3, 3)])
def test_short_calls_are_filled_up_and_cut_off_again(rows: int | None, given: int, called: int) -> None:
    network, fixed = _map(rows)
    _, plain = _map(None)
    x, t, s, cond = _inputs(given)
    assert torch.equal(fixed.jump(x, t, s, cond), plain.jump(x, t, s, cond))
    assert torch.equal(fixed.velocity(x, t, cond), plain.velocity(x, t, cond))
    assert network.rows == [called, called]
    assert (fixed.anchors, fixed.path) == (plain.anchors, plain.path)


def test_rows_that_fill_up_have_no_gradient() -> None:
    gradients = []
    for rows in (None, 8):
        network, fixed = _map(rows)
        x, t, s, cond = _inputs(3)
        fixed.jump(x, t, s, cond).square().mean().backward()
        gradients.append(torch.stack([network.scale.grad, network.shift.grad]))  # type: ignore[list-item]
    assert torch.allclose(*gradients, rtol=1e-6)


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_a_bf16_rollout_replays_to_ratio_one_in_calls_of_one_shape(two_time_folder: str, trained: str) -> None:
    model = FluxModel.from_folder(two_time_folder, torch.device("cpu"), torch.bfloat16, name="tiny")  # type: ignore[arg-type]
    if trained == "full":
        model.unfreeze("full", old=False, reference=False)
    else:
        model.attach_adapter(2, 4.0, ["attention"], 0.0, seed=0)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.fix_rows(4)
    groups = torch.arange(2).repeat_interleave(5)
    cond = model.encode(["a red circle left", "a blue square right"]).select(groups)
    stochasticizer = toy.stochasticizer("asfmc-endpoint")
    grid = make_grid("uniform", 3, image_tokens=16)
    drawn = rollout(
        model.flow_map, stochasticizer, cond, groups, grid, seed=0, latent_shape=model.latent_shape, batch_size=4
    )
    rewards = torch.arange(10.0)
    scored = ScoredRollout(drawn, RewardOutput(rewards, {}), group_advantages(rewards, groups, global_std=True))
    objective = objectives.build("grpo", {"clip_range": 1e-4}).bind(stochasticizer)
    batch = objective.prepare(scored, model.policies, seed=0)
    # 20 rows in calls of 4 after a rollout of 10 samples in calls of 4, 4 and 2
    shuffled = batch.select(torch.randperm(len(batch), generator=torch.Generator().manual_seed(3)))
    assert replay_ratio(stochasticizer, model.policies, shuffled, 4) <= 0.1 * 1e-4
