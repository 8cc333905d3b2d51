"""Identities of fmg.stochasticizers (theory: docs/math.md, eq. 11-18), one per function."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fmg.core.protocols import Density
from fmg.core.types import Conditioning
from fmg.flow import GaussianMap, LinearPath, UnscaledGaussian, VelocityMap
from fmg.registry import stochasticizers
from fmg.stochasticizers.asfmc import Asfmc
from fmg.stochasticizers.configs import AsfmcConfig
from tests.support.analytic import EXACT_KERNELS, PATHS, STEPS, gaussian_map, moment_error, times, unconditional

X = torch.randn(4, 2, generator=torch.Generator().manual_seed(5)).double()


def transition(name: str, options: dict[str, object], t: float, s: float, flow_map: object = None) -> Density:
    chosen = flow_map or gaussian_map(LinearPath())
    return stochasticizers.build(name, options).transition(chosen, X, times(t, 4), times(s, 4), unconditional(4))


def close(density: Density, mean: Tensor, std: float) -> None:
    torch.testing.assert_close(density.mean, mean.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(density.std, torch.full((4,), std), rtol=1e-5, atol=1e-7)


def check_exact_kernels_preserve_the_path() -> None:
    """Identity 2, eq. 11: mean and covariance of `x_s` are those of `p_s`, in fp32, at every anchor, on both paths."""
    for path in PATHS:
        flow_map = gaussian_map(path)
        for name, options in EXACT_KERNELS:
            stochasticizer = stochasticizers.build(name, options)
            assert stochasticizer.path_preserving
            for t, s in STEPS:
                error = moment_error(stochasticizer, flow_map, t, s)
                assert error < 2e-6, (path.name, name, options, t, s, error)


def check_euler_form_preserves_the_path_to_first_order() -> None:
    """Identity 2, eq. 14: within the second-order remainder, `2 (h / (1 - s))^2` on a distribution of size about 1.

    The scale `(1 - s) / (1 - s + h)` and the variance of the exact kernel expand in powers of `h / (1 - s)`.
    """
    flow_map, h = gaussian_map(LinearPath()), 0.03 * 0.7**2
    for t, s in STEPS:
        error = moment_error(stochasticizers.build("asfmc-euler"), flow_map, t, s)
        assert error < 2 * (h / (1 - s)) ** 2, (t, s, error)


def check_baselines_leave_the_path() -> None:
    """Identity 2: what does not declare `path_preserving` is off by more than an exact kernel's thousandfold error."""
    for name in ("flow-sde", "dance-sde", "cps", "naive-noise"):
        stochasticizer = stochasticizers.build(name)
        assert not stochasticizer.path_preserving
        assert moment_error(stochasticizer, gaussian_map(LinearPath()), 0.75, 0.5) > 2e-3, name
    weak = stochasticizers.build("asfmc-endpoint", {"noise_level": 0.5})
    assert not weak.path_preserving
    assert moment_error(weak, gaussian_map(LinearPath()), 0.75, 0.5) > 0.1


def check_asfmc_at_zero_is_endpoint() -> None:
    """Identity 1, eq. 13: the anchor 0, by each rule, is the endpoint kernel."""
    for path in PATHS:
        flow_map = gaussian_map(path)
        for t, s in STEPS:
            endpoint = transition("asfmc-endpoint", {}, t, s, flow_map)
            for options in ({"ratio": 0.0}, {"noise_share": 0.0}, {"gap": 1.0}):
                density = transition("asfmc", options, t, s, flow_map)
                assert torch.equal(density.mean, endpoint.mean)
                assert torch.equal(density.std, endpoint.std)


def check_asfmc_at_the_target_is_the_map() -> None:
    """Identity 1, eq. 11: as the anchor reaches `s`, the mean becomes the map's jump and the std vanishes."""
    for path in PATHS:
        flow_map = gaussian_map(path)
        for t, s in STEPS:
            jump = flow_map.jump(X, times(t, 4), times(s, 4), unconditional(4))
            # nearer than the options allow, where the limit shows
            for options in ({"ratio": 1 - 1e-7}, {"noise_share": 1 - 1e-7}, {"gap": 1e-8}):
                near = Asfmc(AsfmcConfig.model_construct(**options))
                density = near.transition(flow_map, X, times(t, 4), times(s, 4), unconditional(4))
                torch.testing.assert_close(density.mean, jump.float(), rtol=1e-5, atol=1e-5)
                assert float(density.std.max()) < 1e-3


def check_asfmc_anchor_rules() -> None:
    """Eq. 12: the four rules, and the default, put the anchor where they say, with the std that follows."""
    flow_map = gaussian_map(LinearPath())
    for t, s in STEPS:
        # rho = t / (1 - t), infinite at 1
        held = 0.0 if t == 1 else (s * (1 - t) / ((1 - s) * t)) ** 0.49
        expected = {
            ("gap", 0.1): max(0.0, s - 0.1),
            ("ratio", 0.6): 0.6 * s,
            ("noise_share", 0.6): 0.6 * s / (1 - 0.4 * s),
            ("hold", 0.7): held * s / (1 - s + held * s),
            ("", 0.0): 0.9 * s,
        }
        for (rule, value), a in expected.items():
            density = transition("asfmc", {rule: value} if rule else {}, t, s)
            scale = (1 - s) / (1 - a)
            jump = flow_map.jump(X, times(t, 4), times(a, 4), unconditional(4))
            close(density, scale * jump, math.sqrt(s**2 - scale**2 * a**2))


def check_endpoint_noise_level() -> None:
    """Eq. 13: the noise level scales the std and leaves the mean."""
    for t, s in STEPS:
        full, half = transition("asfmc-endpoint", {}, t, s), transition("asfmc-endpoint", {"noise_level": 0.5}, t, s)
        assert torch.equal(full.mean, half.mean)
        close(half, full.mean, 0.5 * s)


def check_euler_form_as_published() -> None:
    """Eq. 14 with the published floor of `1 - s` and truncation: no change inside, and the data end at early times."""
    flow_map, published = gaussian_map(LinearPath()), {"floor": 0.05, "truncate": True}
    for t, s in STEPS:
        ours, theirs = transition("asfmc-euler", {}, t, s), transition("asfmc-euler", published, t, s)
        assert torch.equal(ours.mean, theirs.mean)
        assert torch.equal(ours.std, theirs.std)
    for t, s, rest, h in ((1.0, 0.98, 0.05, 0.03 * 0.49), (0.5, 0.02, 0.98, 0.02 * 0.49)):
        density = transition("asfmc-euler", published, t, s)
        y = flow_map.jump(X, times(t, 4), times(s, 4), unconditional(4))
        v = flow_map.velocity(y, times(s, 4), unconditional(4))
        close(density, y - h * (y / rest + v), math.sqrt(2 * h * s / rest))


def check_exact_kernel_tends_to_euler() -> None:
    """Identity 3, eq. 14: halving `h` divides the gaps between means and between variances by 4."""
    for t, s in ((1.0, 0.5), (0.75, 0.5), (0.75, 0.25), (0.9, 0.35)):
        gaps = []
        for h in (0.02, 0.01):
            euler = transition("asfmc-euler", {"epsilon": h, "strength": 1.0}, t, s)
            exact = transition("asfmc", {"gap": h}, t, s)
            gaps.append(((euler.mean - exact.mean).norm(), (euler.std**2 - exact.std**2).abs().max()))
        (mean, variance), (finer_mean, finer_variance) = gaps
        assert 3.7 < float(mean / finer_mean) < 4.3, float(mean / finer_mean)
        assert 3.7 < float(variance / finer_variance) < 4.3, float(variance / finer_variance)


def check_euler_depends_on_one_product() -> None:
    """Eq. 14: only `epsilon strength^2` matters; the defaults give 0.0147."""
    for t, s in STEPS[:4]:
        default = transition("asfmc-euler", {}, t, s)
        same = transition("asfmc-euler", {"epsilon": 0.0147, "strength": 1.0}, t, s)
        close(default, same.mean, math.sqrt(2 * 0.0147 * s / (1 - s)))


@dataclass(frozen=True)
class _TwoFactors:
    """A map whose jump and velocity have a parameter each."""

    jump_factor: Tensor
    velocity_factor: Tensor
    path: LinearPath = field(default_factory=LinearPath)
    anchors: Literal["any"] = "any"

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
        return self.jump_factor * x_t

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.velocity_factor * x_t.detach()


def check_detached_velocity() -> None:
    """Eq. 14: the mean depends on the velocity with factor `-h`, and its gradient not at all when detached."""
    for detach in (False, True):
        flow_map = _TwoFactors(torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True))
        density = transition("asfmc-euler", {"detach_velocity": detach}, 0.75, 0.5, flow_map)
        factors = (flow_map.jump_factor, flow_map.velocity_factor)
        jump, velocity = torch.autograd.grad(density.mean.sum(), factors, allow_unused=True)
        torch.testing.assert_close(jump, (X.sum() * (1 - 0.0147 / 0.5)).float(), rtol=1e-4, atol=1e-4)
        if detach:
            assert velocity is None
        else:
            torch.testing.assert_close(velocity, (-0.0147 * 2 * X.sum()).float(), rtol=1e-4, atol=1e-4)


def check_flow_sde_closed_form() -> None:
    """Identity 9, eq. 15: against the formula written out in Python floats, at `t = 1` too."""
    flow_map = gaussian_map(LinearPath())
    for t, s in STEPS:
        v, dt = flow_map.velocity(X, times(t, 4), unconditional(4)), s - t
        eta = 0.7 * math.sqrt(t / (1 - (s if t == 1 else t)))
        mean = X * (1 + eta**2 * dt / (2 * t)) + v * (1 + eta**2 * (1 - t) / (2 * t)) * dt
        close(transition("flow-sde", {}, t, s), mean, eta * math.sqrt(-dt))


def check_dance_sde_closed_form() -> None:
    """Eq. 16: with the score `-(x + (1 - t) v) / t` of the linear path."""
    flow_map = gaussian_map(LinearPath())
    for t, s in STEPS:
        v, dt = flow_map.velocity(X, times(t, 4), unconditional(4)), s - t
        mean = X + dt * v + 0.5 * 0.3**2 * dt * (X + (1 - t) * v) / t
        close(transition("dance-sde", {}, t, s), mean, 0.3 * math.sqrt(-dt))


def check_velocity_sdes_preserve_the_path_in_the_limit() -> None:
    """Eq. 15-16: both are discretised SDEs with the right marginals, so one step of size d is off by O(d^2)."""
    for name in ("flow-sde", "dance-sde"):
        stochasticizer = stochasticizers.build(name, {"noise_level": 0.5})
        coarse = moment_error(stochasticizer, gaussian_map(LinearPath()), 0.6, 0.56)
        fine = moment_error(stochasticizer, gaussian_map(LinearPath()), 0.6, 0.58)
        assert 3.4 < coarse / fine < 4.6, (name, coarse / fine)


def check_cps_closed_form() -> None:
    """Eq. 17: `(1 - s) x0 + sqrt(s^2 - std^2) x1` with `std = s sin(k pi / 2)`."""
    flow_map = gaussian_map(LinearPath())
    for t, s in STEPS:
        v, std = flow_map.velocity(X, times(t, 4), unconditional(4)), s * math.sin(0.4 * math.pi)
        mean = (1 - s) * (X - t * v) + math.sqrt(s**2 - std**2) * (X + (1 - t) * v)
        close(transition("cps", {}, t, s), mean, std)


def check_cps_at_full_noise_is_endpoint() -> None:
    """Identity 7, eq. 17: with k = 1, and the clean estimate from the map, cps is the endpoint kernel."""

    @dataclass(frozen=True)
    class Secant:
        """The Gaussian's map with the average velocity to 0 in place of the diagonal one."""

        exact: GaussianMap
        path: LinearPath = field(default_factory=LinearPath)
        anchors: str = "any"

        def jump(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
            return self.exact.jump(x_t, t, s, cond)

        def velocity(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            return (x_t - self.exact.jump(x_t, t, torch.zeros_like(t), cond)) / t[:, None]

    flow_map = Secant(gaussian_map(LinearPath()))
    for t, s in STEPS:
        density = transition("cps", {"noise_level": 1.0}, t, s, flow_map)
        endpoint = transition("asfmc-endpoint", {}, t, s, flow_map)
        close(density, endpoint.mean, s)


def check_anchor_on_a_velocity_map_is_cps() -> None:
    """Eq. 11 and 17: where a jump is one Euler step, an anchor of noise share m is cps with `cos(k pi / 2) = m`."""
    exact = gaussian_map(LinearPath())
    flow_map = VelocityMap(exact.velocity, LinearPath())
    for t, s in STEPS:
        for share in (0.0, 0.3, 0.9):
            anchored = transition("asfmc", {"noise_share": share}, t, s, flow_map)
            cps = transition("cps", {"noise_level": 2 / math.pi * math.acos(share)}, t, s, flow_map)
            close(anchored, cps.mean, float(cps.std[0]))


def check_cps_published_log_prob() -> None:
    """The option changes the log-probability to `-mean (x - mean)^2` and nothing else."""
    ours, theirs = transition("cps", {}, 0.75, 0.5), transition("cps", {"published_log_prob": True}, 0.75, 0.5)
    assert isinstance(theirs, UnscaledGaussian)
    assert not isinstance(ours, UnscaledGaussian)
    close(theirs, ours.mean, float(ours.std[0]))


def check_naive_noise_closed_form() -> None:
    """Eq. 18: the map's jump plus `k s xi`."""
    flow_map = gaussian_map(LinearPath())
    for t, s in STEPS:
        close(
            transition("naive-noise", {}, t, s), flow_map.jump(X, times(t, 4), times(s, 4), unconditional(4)), 0.7 * s
        )
