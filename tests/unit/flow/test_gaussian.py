from __future__ import annotations

import pytest
import torch

from fmg.core.protocols import Density
from fmg.flow import Gaussian


@pytest.mark.parametrize("std", [0.0, -0.1, float("nan"), float("inf")])
def test_a_deterministic_step_is_not_a_gaussian(std: float) -> None:
    with pytest.raises(ValueError, match="positive finite"):
        Gaussian(torch.zeros(2, 3), torch.tensor([1.0, std]))


@pytest.mark.parametrize("std", [torch.tensor(1.0), torch.ones(1), torch.ones(3), torch.ones(2, 1)])
def test_one_std_per_row(std: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one std per row"):
        Gaussian(torch.zeros(2, 3), std)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_everything_is_fp32(dtype: torch.dtype) -> None:
    density = Gaussian(torch.zeros(2, 3, dtype=dtype), torch.ones(2, dtype=dtype))
    x = torch.ones(2, 3, dtype=dtype)
    results = (density.mean, density.std, density.push(x), density.log_prob(x), density.kl(density))
    assert {result.dtype for result in results} == {torch.float32}


def test_samples_follow_the_generator() -> None:
    density = Gaussian(torch.zeros(3, 2), torch.full((3,), 2.0))
    first, second = (density.sample(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, density.push(torch.randn(3, 2, generator=torch.Generator().manual_seed(7))))


def test_a_value_of_another_shape_is_refused() -> None:
    density = Gaussian(torch.zeros(3, 3), torch.ones(3))
    with pytest.raises(ValueError, match="shaped"):
        density.log_prob(torch.zeros(3))


def test_gradient_of_the_log_density_is_the_standardised_residual() -> None:
    """The policy gradient: `(x - mean) / std^2 / dimensions`."""
    mean = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    std, x = torch.tensor([0.1, 0.8]), torch.zeros(2, 5)
    (gradient,) = torch.autograd.grad(Gaussian(mean, std).log_prob(x).sum(), mean)
    torch.testing.assert_close(gradient, (x - mean.detach()) / std[:, None] ** 2 / 5)


def test_density_protocol() -> None:
    density: Density = Gaussian(torch.zeros(1, 1), torch.ones(1))
    assert density.push(torch.ones(1, 1)).item() == 1
