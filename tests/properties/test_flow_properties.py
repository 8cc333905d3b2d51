"""Identities for arbitrary times, anchors and distributions (hypothesis)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmg.flow import AffinePath, Gaussian, GaussianMap, LinearPath, TrigPath, make_grid
from fmg.registry import stochasticizers
from tests.support.analytic import moment_error, times, unconditional

BUILT_IN = ("asfmc", "asfmc-endpoint", "asfmc-euler", "flow-sde", "dance-sde", "cps", "naive-noise")
paths = st.sampled_from([LinearPath(), TrigPath()])
unit = st.floats(0, 1, allow_subnormal=False)
inside = st.floats(0.02, 0.98)
fast = settings(max_examples=60, deadline=None, derandomize=True)


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@st.composite
def gaussian_maps(draw: st.DrawFn) -> GaussianMap:
    """A random mean, eigenvalues in [0.01, 4] and a random rotation."""
    angle = draw(st.floats(0, math.pi))
    basis = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
    spread = torch.tensor([draw(st.floats(0.01, 4)), draw(st.floats(0.01, 4))]).double()
    mean = torch.tensor([draw(st.floats(-3, 3)), draw(st.floats(-3, 3))]).double()
    covariance = basis @ torch.diag(spread) @ basis.T
    return GaussianMap(mean, (covariance + covariance.T) / 2, draw(paths))


@fast
@given(paths, unit, unit, unit)
def test_kernels_compose(path: AffinePath, x: float, y: float, z: float) -> None:
    """Eq. 2: resampling from a to b and on to c is resampling from a to c."""
    a, b, c = (one(value) for value in sorted((x, y, z)))
    (first_scale, first_std), (second_scale, second_std) = path.kernel(a, b), path.kernel(b, c)
    scale, std = path.kernel(a, c)
    torch.testing.assert_close(first_scale * second_scale, scale, rtol=1e-9, atol=1e-12)
    composed = second_scale**2 * first_std**2 + second_std**2
    torch.testing.assert_close(composed, std**2, rtol=1e-7, atol=1e-12)


@fast
@given(paths, unit, unit)
def test_kernel_is_finite_and_ordered_in_single_precision(path: AffinePath, x: float, y: float) -> None:
    a, s = (torch.tensor([value], dtype=torch.float32) for value in sorted((x, y)))
    scale, std = path.kernel(a, s)
    assert 0 <= float(scale) <= 1
    assert 0 <= float(std) <= 1 + 1e-6
    assert 0 <= float(path.noise_share(a, s)) <= 1 + 1e-6
    assert float(std) > 0 or float(s - a) < 1e-6


@fast
@given(paths, st.floats(0, 0.999), inside)
def test_anchor_lies_below_the_target_and_has_the_share(path: AffinePath, share: float, target: float) -> None:
    """Eq. 3, both directions."""
    anchor = path.anchor(one(share), one(target))
    assert 0 <= float(anchor) <= target
    torch.testing.assert_close(path.noise_share(anchor, one(target)), one(share), rtol=1e-8, atol=1e-12)


@fast
@given(gaussian_maps(), unit, unit, unit)
def test_gaussian_maps_are_a_semigroup(flow_map: GaussianMap, t: float, middle: float, s: float) -> None:
    """Eq. 5: `X_{m->s} X_{t->m} = X_{t->s}`, so `X_{s->t}` inverts `X_{t->s}`."""
    x, cond = torch.tensor([[0.7, -1.1]]).double(), unconditional(1)
    by_way = flow_map.jump(flow_map.jump(x, one(t), one(middle), cond), one(middle), one(s), cond)
    torch.testing.assert_close(by_way, flow_map.jump(x, one(t), one(s), cond), rtol=1e-8, atol=1e-8)


@fast
@given(gaussian_maps(), st.floats(0, 0.99), inside, inside, st.sampled_from(["ratio", "noise_share"]))
def test_every_anchor_preserves_every_gaussian(
    flow_map: GaussianMap, value: float, x: float, y: float, rule: str
) -> None:
    """Identity 2, eq. 11."""
    s, t = sorted((x, y))
    if t - s < 1e-3:
        return
    assert moment_error(stochasticizers.build("asfmc", {rule: value}), flow_map, t, s) < 1e-4


@fast
@given(st.floats(0.01, 5), st.floats(0.01, 5), st.floats(-3, 3))
def test_divergence_is_positive_and_zero_on_itself(std: float, other: float, shift: float) -> None:
    p = Gaussian(torch.zeros(1, 4), torch.tensor([std]))
    q = Gaussian(torch.full((1, 4), shift), torch.tensor([other]))
    assert float(p.kl(q)) >= -1e-6
    assert float(p.kl(p)) == 0


@fast
@given(
    st.sampled_from(["uniform", "paper", "scm", "flux-shift", "flux2-shift", "shift-3"]),
    st.integers(3, 60),
    st.integers(16, 16_384),
)
def test_grids_fall_from_one_to_zero(name: str, steps: int, tokens: int) -> None:
    grid = make_grid(name, steps, image_tokens=tokens)
    assert len(grid) == steps + 1
    assert grid[0] == 1
    assert grid[-1] == 0
    assert all(later < earlier for earlier, later in pairwise(grid))


@pytest.mark.parametrize("width", [2, 5])
def test_rows_do_not_mix(width: int) -> None:
    """A batch as wide as the data: each row's result is that of the row alone."""
    flow_map = GaussianMap(torch.zeros(width).double(), torch.eye(width).double() * 0.5, LinearPath())
    x = torch.arange(width * width).double().reshape(width, width) / 7
    t, s = torch.linspace(0.9, 0.6, width).double(), torch.linspace(0.5, 0.1, width).double()
    for name in BUILT_IN:
        whole = stochasticizers.build(name).transition(flow_map, x, t, s, unconditional(width))
        for i in range(width):
            row = stochasticizers.build(name).transition(
                flow_map, x[i : i + 1], t[i : i + 1], s[i : i + 1], unconditional(1)
            )
            torch.testing.assert_close(whole.mean[i], row.mean[0])
            torch.testing.assert_close(whole.std[i], row.std[0])


def test_deterministic_sampling_lands_on_the_data() -> None:
    """Eq. 5: whatever the grid, the exact map sends noise where one jump does."""
    flow_map = GaussianMap(torch.tensor([1.0, -2.0]).double(), torch.eye(2).double() * 0.3, LinearPath())
    start = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).double()
    direct = flow_map.jump(start, times(1.0, 8), times(0.0, 8), unconditional(8))
    for name in ("uniform", "paper", "scm"):
        x, grid = start, make_grid(name, 5)
        for t, s in pairwise(grid):
            x = flow_map.jump(x, times(t, 8), times(s, 8), unconditional(8))
        torch.testing.assert_close(x, direct)
