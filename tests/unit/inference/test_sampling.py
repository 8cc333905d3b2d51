"""The native sampler: deterministic jumps for two-time maps, multistep consistency sampling for single-time maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fmg.core.types import Conditioning
from fmg.flow import GaussianMap, LinearPath
from fmg.flow.sampling import native_sample
from tests.support import toy


def standard(seed: int, rows: int) -> Tensor:
    return torch.randn(rows, *toy.SHAPE, generator=torch.Generator().manual_seed(seed))


def no_noise(interval: int) -> Tensor:
    raise AssertionError(f"a two-time map asked for noise at interval {interval}")


def test_a_two_time_map_is_jumped_along_the_grid() -> None:
    _, flow_map = toy.two_time()
    x, cond = standard(0, 3), Conditioning(("",) * 3, {})
    expected = x
    for t, s in zip(toy.GRID[:-1], toy.GRID[1:], strict=True):
        expected = flow_map.jump(expected, torch.full((3,), t), torch.full((3,), s), cond)
    torch.testing.assert_close(native_sample(flow_map, cond, x, toy.GRID, no_noise), expected, rtol=0, atol=0)


def test_a_single_time_map_is_renoised_between_jumps() -> None:
    _, flow_map = toy.single_time()
    x, cond = standard(0, 3), Conditioning(("",) * 3, {})
    drawn = native_sample(flow_map, cond, x, (1.0, 0.5, 0.0), lambda k: standard(10 + k, 3))
    zero = torch.zeros(3)
    clean = flow_map.jump(x, torch.ones(3), zero, cond)
    noised = 0.5 * clean + 0.5 * standard(10, 3)
    torch.testing.assert_close(drawn, flow_map.jump(noised, torch.full((3,), 0.5), zero, cond), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_exact_map_ends_on_the_data_distribution(steps: int) -> None:
    mean, covariance = torch.tensor([0.8, -1.5]), torch.tensor([[0.6, 0.25], [0.25, 0.3]])
    flow_map = GaussianMap(mean, covariance, LinearPath())
    rows = 20_000
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1))
    grid = [1 - k / steps for k in range(steps + 1)]
    drawn = native_sample(flow_map, Conditioning(("",) * rows, {}), x, grid, no_noise)
    error = (covariance.diagonal() / rows).sqrt()
    assert ((drawn.mean(0) - mean).abs() < 4 * error).all()
    torch.testing.assert_close(drawn.T.cov(), covariance, rtol=0.05, atol=0.02)
