from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fmg.core.errors import CompositionError, UsageError
from fmg.core.types import Conditioning
from fmg.rl import rollout, sample, sample_rollout
from tests.support.toy import GRID, SHAPE, grouped, single_time, stochasticizer, two_time


def test_batch_size_changes_nothing() -> None:
    _, flow_map = two_time()
    cond, groups = grouped(3, 5)
    whole = rollout(flow_map, stochasticizer(), cond, groups, GRID, seed=1, latent_shape=SHAPE)
    parts = rollout(flow_map, stochasticizer(), cond, groups, GRID, seed=1, latent_shape=SHAPE, batch_size=4)
    assert torch.equal(whole.x0, parts.x0)
    for a, b in zip(whole.transitions, parts.transitions, strict=True):
        assert torch.equal(a.x_s, b.x_s)
        assert torch.equal(a.log_prob, b.log_prob)


def test_groups_are_any_sequence_of_numbers() -> None:
    _, flow_map = two_time()
    cond, groups = grouped(2, 3)
    whole = rollout(flow_map, stochasticizer(), cond, groups, GRID, seed=1, latent_shape=SHAPE)
    listed = rollout(flow_map, stochasticizer(), cond, groups.tolist(), GRID, seed=1, latent_shape=SHAPE)
    assert torch.equal(whole.x0, listed.x0)
    assert torch.equal(listed.groups, groups)
    assert torch.equal(sample_rollout(flow_map, cond, tuple(groups), GRID, seed=1, latent_shape=SHAPE).groups, groups)


def test_network_sees_chunks_of_the_requested_size_and_no_gradient() -> None:
    sizes: list[int] = []
    network, flow_map = two_time()
    network.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    cond, groups = grouped(3, 5)
    result = rollout(flow_map, stochasticizer(), cond, groups, GRID, seed=1, latent_shape=SHAPE, batch_size=6)
    assert sizes == [6] * 4 + [6] * 4 + [3] * 4
    assert not result.x0.requires_grad


def test_seed_and_iteration_change_the_noise() -> None:
    _, flow_map = two_time()
    cond, groups = grouped(1, 4)

    def draw(seed: int, iteration: int) -> torch.Tensor:
        return rollout(
            flow_map, stochasticizer(), cond, groups, GRID, seed=seed, iteration=iteration, latent_shape=SHAPE
        ).x0

    assert torch.equal(draw(1, 2), draw(1, 2))
    assert not torch.equal(draw(1, 2), draw(2, 2))
    assert not torch.equal(draw(1, 2), draw(1, 3))


def test_same_initial_noise_is_shared_within_a_group_only() -> None:
    _, flow_map = two_time()
    cond, groups = grouped(2, 3)
    result = rollout(
        flow_map, stochasticizer(), cond, groups, GRID, seed=1, latent_shape=SHAPE, same_initial_noise=True
    )
    start, after = result.transitions[0].x_t, result.transitions[0].x_s
    assert torch.equal(start[0], start[1])
    assert torch.equal(start[0], start[2])
    assert not torch.equal(start[0], start[3])
    assert len({row.sum().item() for row in after}) == 6


def test_window_of_stochastic_steps() -> None:
    _, flow_map = two_time()
    cond, groups = grouped(2, 3)
    result = rollout(flow_map, stochasticizer(), cond, groups, GRID, seed=1, latent_shape=SHAPE, stochastic_steps=[1])
    assert [step.index for step in result.transitions] == [1]
    everything = rollout(flow_map, stochasticizer(), cond, groups, GRID, seed=1, latent_shape=SHAPE)
    x_1 = everything.transitions[0].x_t
    t, s = torch.full((6,), GRID[0]), torch.full((6,), GRID[1])
    assert torch.equal(result.transitions[0].x_t, flow_map.jump(x_1, t, s, cond))


def test_single_time_maps_roll_out_with_the_endpoint_anchor_only() -> None:
    _, flow_map = single_time()
    cond, groups = grouped(2, 3)
    endpoint = stochasticizer("asfmc-endpoint")
    result = rollout(flow_map, endpoint, cond, groups, GRID, seed=1, latent_shape=SHAPE)
    assert len(result.transitions) == 3
    with pytest.raises(CompositionError):
        rollout(flow_map, endpoint, cond, groups, GRID, seed=1, latent_shape=SHAPE, stochastic_steps=[0])


def test_sample_rollout_is_the_native_sampler_on_the_rollout_noise() -> None:
    cond, groups = grouped(2, 3)
    for make in (two_time, single_time):
        _, flow_map = make()
        result = sample_rollout(flow_map, cond, groups, GRID, seed=1, iteration=2, latent_shape=SHAPE, batch_size=4)
        whole = sample_rollout(flow_map, cond, groups, GRID, seed=1, iteration=2, latent_shape=SHAPE)
        assert torch.equal(result.x0, whole.x0)
        assert result.grid == GRID


def test_single_time_sampling_needs_keys() -> None:
    _, flow_map = single_time()
    cond, _ = grouped(1, 2)
    with pytest.raises(UsageError, match="0 noise keys for 2 rows"):
        sample(flow_map, cond, torch.zeros(2, *SHAPE), GRID)
    assert sample(flow_map, cond, torch.zeros(2, *SHAPE), (1.0, 0.0)).shape == (2, *SHAPE)


def test_states_follow_the_conditioning_to_its_device() -> None:
    _, flow_map = two_time()
    cond = Conditioning(("a", "b"), {"tokens": torch.zeros(2, 1, device="cpu")})
    result = rollout(flow_map, stochasticizer(), cond, torch.tensor([0, 0]), GRID, seed=0, latent_shape=SHAPE)
    assert result.x0.device == cond.tensors["tokens"].device


@pytest.mark.parametrize(
    ("grid", "steps", "batch_size", "message"),
    [
        ((1.0, 0.0), None, None, "no stochastic transition"),
        ((1.0, 0.5, 0.5, 0.0), None, None, "strictly decreasing"),
        ((1.0, 0.5, 0.1), None, None, "to 0"),
        ((1.2, 0.5, 0.0), None, None, "at most 1"),
        ((0.0,), None, None, "strictly decreasing"),
        (GRID, [3], None, "0 to 2"),
        (GRID, [-1], None, "0 to 2"),
        (GRID, [], None, "at least one index"),
        (GRID, None, 0, "at least 1"),
    ],
)
def test_what_cannot_be_rolled_out_is_refused(
    grid: Sequence[float], steps: Sequence[int] | None, batch_size: int | None, message: str
) -> None:
    _, flow_map = two_time()
    cond, groups = grouped(1, 2)
    with pytest.raises(UsageError, match=message):
        rollout(
            flow_map,
            stochasticizer(),
            cond,
            groups,
            grid,
            seed=0,
            latent_shape=SHAPE,
            stochastic_steps=steps,
            batch_size=batch_size,
        )


def test_rows_must_match() -> None:
    _, flow_map = two_time()
    cond, _ = grouped(1, 2)
    for groups in (torch.tensor([0]), torch.tensor([], dtype=torch.long)):
        with pytest.raises(UsageError, match="one group index for each sample"):
            rollout(flow_map, stochasticizer(), cond, groups, GRID, seed=0, latent_shape=SHAPE)
