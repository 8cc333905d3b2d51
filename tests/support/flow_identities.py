"""Identities of fmg.flow, one per function: tests call them, and the mutation test calls them on broken sources."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmg.core.types import Conditioning
from fmg.flow import (
    Gaussian,
    GaussianMap,
    LinearPath,
    MixtureMap,
    SingleTimeMap,
    TrigFlowMap,
    TrigPath,
    TwoTimeMap,
    UnscaledGaussian,
    make_grid,
)
from fmg.flow.sampling import native_sample
from tests.support.analytic import PATHS, gaussian_map, mixture_map, times, unconditional
from tests.support.trigflow import trigflow_prediction

LATTICE = torch.linspace(0, 1, 21, dtype=torch.float64)


def draw(*shape: int) -> Tensor:
    """The same standard normal numbers at every call of the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def pairs() -> tuple[Tensor, Tensor]:
    """All `a <= s` of the lattice, `a = s` and both ends included."""
    grid = torch.cartesian_prod(LATTICE, LATTICE)
    return tuple(grid[grid[:, 0] <= grid[:, 1]].T)


def check_path_coefficients() -> None:
    """Eq. 1: the ends, and each path's own relation between signal and noise."""
    for path in PATHS:
        ends = torch.tensor([0.0, 1.0])
        assert path.alpha(ends).tolist() == [1.0, 0.0]
        assert path.sigma(ends).tolist() == [0.0, 1.0]
    linear, trig = LinearPath(), TrigPath()
    torch.testing.assert_close(linear.alpha(LATTICE) + linear.sigma(LATTICE), torch.ones_like(LATTICE))
    torch.testing.assert_close(linear.sigma(LATTICE), LATTICE)
    torch.testing.assert_close(trig.alpha(LATTICE) ** 2 + trig.sigma(LATTICE) ** 2, torch.ones_like(LATTICE))
    torch.testing.assert_close(trig.sigma(LATTICE), torch.sin(LATTICE * math.pi / 2))


def check_path_rates() -> None:
    """Eq. 4: the rates are the derivatives of the coefficients."""
    for path in PATHS:
        t = LATTICE.clone().requires_grad_()
        (alpha_rate,) = torch.autograd.grad(path.alpha(t).sum(), t)
        (sigma_rate,) = torch.autograd.grad(path.sigma(t).sum(), t)
        torch.testing.assert_close(path.rates(LATTICE), (alpha_rate, sigma_rate))


def check_kernel_moments() -> None:
    """Eq. 2: the kernel moves `p_a` to `p_s`: signal and variance come out right for every pair."""
    a, s = pairs()
    for path in PATHS:
        scale, std = path.kernel(a, s)
        torch.testing.assert_close(scale * path.alpha(a), path.alpha(s))
        torch.testing.assert_close(scale**2 * path.sigma(a) ** 2 + std**2, path.sigma(s) ** 2)


def check_kernel_at_equal_times() -> None:
    """Eq. 2 at `a = s` is the identity, exactly and up to both ends."""
    for path in PATHS:
        scale, std = path.kernel(LATTICE.float(), LATTICE.float())
        assert scale.tolist() == [1.0] * 21
        assert std.tolist() == [0.0] * 21


def check_kernel_precision() -> None:
    """Eq. 2 close to `a = s` and to 1: fp32 keeps the std to 1e-5, where the unfactored form loses it."""
    s = torch.cat([torch.linspace(0.05, 0.95, 19), torch.tensor([0.999, 0.9999])])
    a = s - torch.cat([torch.full((19,), 1e-4), torch.tensor([1e-3, 9e-4])])
    for path in PATHS:
        _, std = path.kernel(a, s)
        _, exact = path.kernel(a.double(), s.double())
        torch.testing.assert_close(std.double(), exact, rtol=1e-5, atol=0)


def check_noise_share() -> None:
    """Eq. 3: the second form of the kernel, std `sigma_s sqrt(1 - m^2)`."""
    a, s = pairs()
    for path in PATHS:
        m, (_, std) = path.noise_share(a, s), path.kernel(a, s)
        assert bool(((m >= 0) & (m <= 1)).all())
        torch.testing.assert_close(path.sigma(s) * (1 - m**2).sqrt(), std, rtol=1e-6, atol=1e-7)


def check_anchor_inverts_noise_share() -> None:
    """Eq. 3: `anchor` is the inverse of `noise_share`, on both paths."""
    m, s = torch.cartesian_prod(torch.linspace(0, 0.99, 12).double(), torch.linspace(0.02, 0.98, 17).double()).T
    for path in PATHS:
        anchor = path.anchor(m, s)
        assert bool((anchor <= s).all())
        torch.testing.assert_close(path.noise_share(anchor, s), m)
        assert path.anchor(torch.zeros(1), torch.ones(1)).tolist() == [0.0]


def check_gaussian_density() -> None:
    """Eq. 9: parity with torch.distributions, averaged over coordinates."""
    mean, std, x = draw(3, 2, 4, 4), torch.tensor([0.05, 0.7, 2.0]), draw(3, 2, 4, 4).flip(0)
    reference = torch.distributions.Normal(mean, std.reshape(3, 1, 1, 1).expand_as(mean))
    torch.testing.assert_close(Gaussian(mean, std).log_prob(x), reference.log_prob(x).mean(dim=(1, 2, 3)))


def check_gaussian_divergence() -> None:
    """Eq. 10: parity with torch.distributions; with equal stds the squared distance of the means."""
    mean, other = draw(3, 2, 5), draw(3, 2, 5).flip(0)
    std, wide = torch.tensor([0.1, 0.7, 2.0]), torch.tensor([0.4, 0.5, 1.0])
    p = torch.distributions.Normal(mean, std[:, None, None].expand_as(mean))
    q = torch.distributions.Normal(other, wide[:, None, None].expand_as(mean))
    expected = torch.distributions.kl_divergence(p, q).mean(dim=(1, 2))
    torch.testing.assert_close(Gaussian(mean, std).kl(Gaussian(other, wide)), expected)
    distance = (mean - other).square().mean(dim=(1, 2)) / (2 * std**2)
    torch.testing.assert_close(Gaussian(mean, std).kl(Gaussian(other, std)), distance)


def check_gaussian_push() -> None:
    """A sample is `mean + std noise`, and its standardised value is the noise."""
    mean, std, noise = draw(2, 3), torch.tensor([0.5, 3.0]), draw(2, 3).flip(0)
    torch.testing.assert_close(Gaussian(mean, std).push(noise), mean + std[:, None] * noise)


def check_unscaled_density() -> None:
    """The published Flow-CPS log-probability: `-mean (x - mean)^2`, whatever the std."""
    mean, x = draw(2, 3), draw(2, 3).flip(0)
    for std in (torch.ones(2), torch.full((2,), 0.1)):
        torch.testing.assert_close(UnscaledGaussian(mean, std).log_prob(x), -((x - mean) ** 2).mean(dim=1))


def check_grids() -> None:
    """The grids against the numbers in their sources."""

    def close(grid: tuple[float, ...], expected: list[float]) -> None:
        assert len(grid) == len(expected)
        assert all(math.isclose(x, y, abs_tol=5e-5) for x, y in zip(grid, expected, strict=True)), grid

    close(make_grid("uniform", 4), [1, 0.75, 0.5, 0.25, 0])
    close(make_grid("paper", 5), [1, 0.7625, 0.525, 0.2875, 0.05, 0])
    close(make_grid("flux-shift", 4, image_tokens=1024), [1, 0.84925, 0.65249, 0.38495, 0])
    close(make_grid("shift-3", 4), [1, 0.9, 0.75, 0.5, 0])
    close(make_grid("scm", 2), [1, 0.78271, 0])
    close(make_grid("scm", 3), [1, 0.63397, 0.36603, 0])
    close(make_grid("scm-angle", 2), [1, 0.82761, 0])
    close(make_grid("scm-angle", 3), [1, 0.66667, 0.33333, 0])


def check_gaussian_map_marginals() -> None:
    """Eq. 5: the exact map pushes `p_t` to `p_s`, forwards and backwards in time."""
    for path in PATHS:
        flow_map = gaussian_map(path)
        for t, s in ((1.0, 0.0), (0.8, 0.3), (0.2, 0.9)):
            probes = torch.cat([torch.zeros(1, 2), torch.eye(2)]).double()
            moved = flow_map.jump(probes, times(t, 3), times(s, 3), unconditional(3))
            matrix = (moved[1:] - moved[0]).T
            mean_t, covariance_t = (x[0] for x in flow_map.marginal(times(t, 1)))
            mean_s, covariance_s = (x[0] for x in flow_map.marginal(times(s, 1)))
            torch.testing.assert_close(matrix @ mean_t + moved[0], mean_s)
            torch.testing.assert_close(matrix @ covariance_t @ matrix.T, covariance_s)


def check_gaussian_map_velocity() -> None:
    """Eq. 4 and 5: the velocity is the time derivative of the map at `s = t`."""
    for path in PATHS:
        flow_map, x, h = gaussian_map(path), draw(4, 2).double(), 1e-5
        for t in (0.1, 0.5, 0.9):
            ahead = flow_map.jump(x, times(t, 4), times(t + h, 4), unconditional(4))
            behind = flow_map.jump(x, times(t, 4), times(t - h, 4), unconditional(4))
            velocity = flow_map.velocity(x, times(t, 4), unconditional(4))
            torch.testing.assert_close((ahead - behind) / (2 * h), velocity, rtol=1e-6, atol=1e-7)


def check_mixture_map() -> None:
    """Eq. 4: one isotropic component is the Gaussian's map; several compose, and end on their means when narrow."""
    for path in PATHS:
        mean, x = torch.tensor([0.4, -1.0]).double(), draw(6, 2).double()
        one = MixtureMap(torch.ones(1).double(), mean[None], torch.tensor([0.5]).double(), path)
        same = GaussianMap(mean, 0.25 * torch.eye(2).double(), path)
        for t, s in ((1.0, 0.0), (0.7, 0.2)):
            arguments = (x, times(t, 6), times(s, 6), unconditional(6))
            torch.testing.assert_close(one.jump(*arguments), same.jump(*arguments), rtol=1e-5, atol=1e-6)
        several = mixture_map(path)
        middle = several.jump(x, times(1.0, 6), times(0.4, 6), unconditional(6))
        direct = several.jump(x, times(1.0, 6), times(0.1, 6), unconditional(6))
        composed = several.jump(middle, times(0.4, 6), times(0.1, 6), unconditional(6))
        torch.testing.assert_close(composed, direct, rtol=1e-4, atol=1e-4)
        narrow = MixtureMap(several.weights, several.means, torch.full((3,), 0.02).double(), path, 256)
        landed = narrow.jump(x, times(1.0, 6), times(0.0, 6), unconditional(6))
        assert float(torch.cdist(landed, several.means).min(dim=1).values.max()) < 0.1


def check_mixture_velocity() -> None:
    """Eq. 4: against the score of `p_t` by automatic differentiation of torch.distributions' mixture."""
    for path in PATHS:
        flow_map, t = mixture_map(path), times(0.6, 5)
        alpha, sigma, (alpha_rate, sigma_rate) = path.alpha(t)[0], path.sigma(t)[0], path.rates(t)
        x = draw(5, 2).double().requires_grad_()
        stds = ((alpha * flow_map.stds) ** 2 + sigma**2).sqrt()[:, None].expand(3, 2)
        components = torch.distributions.Independent(torch.distributions.Normal(alpha * flow_map.means, stds), 1)
        marginal = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(flow_map.weights), components)
        (score,) = torch.autograd.grad(marginal.log_prob(x).sum(), x)
        growth = alpha_rate[0] / alpha
        expected = growth * x + (sigma**2 * growth - sigma * sigma_rate[0]) * score
        torch.testing.assert_close(flow_map.velocity(x, t, unconditional(5)), expected)


def check_two_time_map() -> None:
    """Eq. 6: from the exact average velocity the adapter rebuilds the exact map, and its diagonal the velocity."""
    for path in PATHS:
        exact = gaussian_map(path)

        def network(x: Tensor, t: Tensor, s: Tensor, cond: Conditioning, exact: GaussianMap = exact) -> Tensor:
            average = (x - exact.jump(x, t, s, cond)) / torch.where(t == s, 1.0, t - s)[:, None]
            return torch.where((t == s)[:, None], exact.velocity(x, t, cond), average)

        adapter, x, cond = TwoTimeMap(network, path), draw(3, 2).double(), unconditional(3)
        t, s = torch.tensor([1.0, 0.8, 0.5]).double(), torch.tensor([0.0, 0.3, 0.5]).double()
        torch.testing.assert_close(adapter.jump(x, t, s, cond), exact.jump(x, t, s, cond))
        torch.testing.assert_close(adapter.velocity(x, t, cond), exact.velocity(x, t, cond))


def check_single_time_map() -> None:
    """Eq. 7: the same at `s = 0`."""
    exact, x, cond = gaussian_map(LinearPath()), draw(3, 2).double(), unconditional(3)
    t, zero = torch.tensor([1.0, 0.8, 0.2]).double(), torch.zeros(3).double()
    adapter = SingleTimeMap(lambda x, t, cond: (x - exact.jump(x, t, 0 * t, cond)) / t[:, None], LinearPath())
    torch.testing.assert_close(adapter.jump(x, t, zero, cond), exact.jump(x, t, zero, cond))


def check_native_sampler_keeps_the_path() -> None:
    """Eq. 13 at full noise, and eq. 5: jumps of an exact map compose; a single-time map is renoised at each time."""
    grid, cond, x_1 = (1.0, 0.7, 0.3, 0.0), unconditional(4), draw(4, 2).double()
    noises = [draw(4, 3 + k)[:, :2].double() for k in range(2)]
    for path in PATHS:
        exact = gaussian_map(path)
        zero = times(0.0, 4)
        composed = native_sample(exact, cond, x_1, grid, noises.__getitem__)
        torch.testing.assert_close(composed, exact.jump(x_1, times(1.0, 4), zero, cond), rtol=1e-5, atol=1e-5)

        single = SingleTimeMap(lambda x, t, cond, f=exact: (x - f.jump(x, t, 0 * t, cond)) / t[:, None], path)
        state = exact.jump(x_1, times(1.0, 4), zero, cond)
        for time, noise in zip(grid[1:-1], noises, strict=True):
            level = times(time, 4)
            state = path.alpha(level)[:, None] * state + path.sigma(level)[:, None] * noise
            state = exact.jump(state, level, zero, cond)
        sampled = native_sample(single, cond, x_1, grid, noises.__getitem__)
        torch.testing.assert_close(sampled, state, rtol=1e-5, atol=1e-5)


def check_trigflow_wrapper_cancels() -> None:
    """Eq. 8 (identity 8): denoising through the TrigFlow wrapper is `sigma_data (z - s net(z, s))`."""

    def network(z: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(z * 1.3 + s[:, None]) + z.flip(1)

    x, angle, sigma_data = draw(5, 3).double(), torch.linspace(0.1, math.pi / 2, 5).double(), 0.5
    prediction = trigflow_prediction(network, x, angle, sigma_data)
    denoised = angle.cos()[:, None] * x - angle.sin()[:, None] * sigma_data * prediction
    s = angle.sin() / (angle.sin() + angle.cos())
    z = x / sigma_data * (s**2 + (1 - s) ** 2).sqrt()[:, None]
    adapter = SingleTimeMap(lambda z, s, cond: network(z, s), LinearPath())
    torch.testing.assert_close(denoised, sigma_data * adapter.jump(z, s, torch.zeros_like(s), unconditional(5)))
    # on the trig path itself, where the state has unit data and the time is the angle
    trig = TrigFlowMap(lambda z, s, cond: network(z, s))
    moved = trig.jump(x / sigma_data, (angle / (math.pi / 2)).clamp(max=1), torch.zeros_like(angle), unconditional(5))
    torch.testing.assert_close(denoised, sigma_data * moved)
