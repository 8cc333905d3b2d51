"""Identity 2: sampled rollouts of path-preserving kernels follow the probability path; the others do not.

`stochasticizer_identities` checks moments without sampling; here whole rollouts are sampled. On a Gaussian, mean and
covariance lie within four standard errors. On a mixture, the sliced Wasserstein distance lies within the floor: the
largest distance among exact samples of the same size.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fmg.core.protocols import FlowMap, Stochasticizer
from fmg.flow import AffinePath, LinearPath, MixtureMap, TrigPath, make_grid
from fmg.registry import stochasticizers
from tests.support.analytic import EXACT_KERNELS, PATHS, gaussian_map, mixture_map, times, unconditional

GRID = make_grid("uniform", 4)
BASELINES = ("flow-sde", "dance-sde", "cps", "naive-noise")


def states(stochasticizer: Stochasticizer, flow_map: FlowMap, count: int) -> list[Tensor]:
    """The states of a rollout after each interval: stochastic ones, then the deterministic end."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    visited = []
    for t, s in pairwise(GRID):
        step = (times(t, count), times(s, count), unconditional(count))
        if s == 0:
            x = flow_map.jump(x, *step)
        else:
            x = stochasticizer.transition(flow_map, x, *step).sample(generator).double()
        visited.append(x)
    return visited


def standard_errors_off(stochasticizer: Stochasticizer, path: AffinePath, count: int = 20_000) -> float:
    """The largest deviation of a mean or covariance entry from the path's, over all states, in standard errors."""
    flow_map, worst = gaussian_map(path), 0.0
    for x, s in zip(states(stochasticizer, flow_map, count), GRID[1:], strict=True):
        mean, covariance = (moment[0] for moment in flow_map.marginal(times(s, 1)))
        variances = covariance.diagonal()
        mean_errors = (x.mean(0) - mean).abs() / (variances / count).sqrt()
        # Var of a sample covariance of Gaussians: (C_ii C_jj + C_ij^2) / n
        spread = ((variances[:, None] * variances + covariance.square()) / count).sqrt()
        covariance_errors = (x.T.cov() - covariance).abs() / spread
        worst = max(worst, float(mean_errors.max()), float(covariance_errors.max()))
    return worst


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize(("name", "options"), EXACT_KERNELS)
def test_exact_kernels_keep_gaussian_moments(name: str, options: dict[str, object], path: AffinePath) -> None:
    assert standard_errors_off(stochasticizers.build(name, options), path) < 4


def test_first_order_form_keeps_gaussian_moments_to_its_order() -> None:
    # its bias, at most h^2 / (1 - s)^2 = 0.0035 at s = 0.75, is below one standard error of 20,000 samples (0.0056)
    assert standard_errors_off(stochasticizers.build("asfmc-euler"), LinearPath()) < 4


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_and_control_lose_gaussian_moments(name: str) -> None:
    assert standard_errors_off(stochasticizers.build(name), LinearPath()) > 12


def projected_quantiles(mixture: MixtureMap, directions: Tensor, count: int) -> Tensor:
    """`(count, directions)` exact quantiles of the projected data, by bisection of the mixture's distribution."""
    levels = (torch.arange(count, dtype=torch.float64) + 0.5)[:, None] / count
    centres = mixture.means @ directions.T
    low, high = torch.full((count, directions.shape[0]), -8.0).double(), torch.full((count, directions.shape[0]), 8.0)
    for _ in range(30):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle[..., None] - centres.T) / mixture.stds) @ mixture.weights < levels
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


COUNT = 6_000
DIRECTIONS = torch.stack([f(torch.arange(16).double() * math.pi / 16) for f in (torch.cos, torch.sin)], dim=1)


@pytest.fixture(scope="module")
def quantiles() -> Tensor:
    return projected_quantiles(mixture_map(LinearPath()), DIRECTIONS, COUNT)


def sliced_w2(x: Tensor, quantiles: Tensor) -> float:
    return float(((x @ DIRECTIONS.T).sort(dim=0).values - quantiles).square().mean().sqrt())


@pytest.fixture(scope="module")
def floor(quantiles: Tensor) -> float:
    generator = torch.Generator().manual_seed(3)
    return max(sliced_w2(mixture_map(LinearPath()).draw(COUNT, generator), quantiles) for _ in range(30))


def final_distance(name: str, options: dict[str, object], path: AffinePath, quantiles: Tensor) -> float:
    flow_map = mixture_map(path, substeps=24)
    return sliced_w2(states(stochasticizers.build(name, options), flow_map, COUNT)[-1], quantiles)


@pytest.mark.parametrize(
    ("name", "options", "path"),
    [
        ("asfmc", {}, LinearPath()),
        ("asfmc", {"gap": 0.0147}, LinearPath()),
        ("asfmc", {"noise_share": 0.5}, TrigPath()),
        ("asfmc-endpoint", {}, LinearPath()),
        ("asfmc-endpoint", {}, TrigPath()),
        ("asfmc-euler", {}, LinearPath()),
    ],
)
def test_path_preserving_kernels_reach_the_mixture(
    name: str, options: dict[str, object], path: AffinePath, quantiles: Tensor, floor: float
) -> None:
    assert final_distance(name, options, path, quantiles) <= floor


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_and_control_miss_the_mixture(name: str, quantiles: Tensor, floor: float) -> None:
    assert final_distance(name, {}, LinearPath(), quantiles) > 1.5 * floor
