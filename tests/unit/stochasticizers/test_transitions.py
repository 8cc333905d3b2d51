from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from fmg.core.errors import CompositionError
from fmg.core.types import Conditioning
from fmg.flow import AffinePath, LinearPath, SingleTimeMap, TrigPath, TwoTimeMap
from fmg.registry import StochasticizerConfig, stochasticizers
from tests.support.analytic import gaussian_map, times, unconditional

NAMES = ("asfmc", "asfmc-endpoint", "asfmc-euler", "flow-sde", "dance-sde", "cps", "naive-noise")
LINEAR_ONLY = ("asfmc-euler", "flow-sde", "dance-sde", "cps", "naive-noise")


class Network(nn.Module):
    """`u(x, t, s)` on images, in any precision; remembers how often it was called."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.calls = 0
        self.mix = nn.Conv2d(3, 3, 1, dtype=dtype)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
        self.calls += 1
        mixed: Tensor = self.mix(x.to(self.mix.weight.dtype))
        return mixed * (1 + t * s)[:, None, None, None].to(mixed.dtype)


@dataclass
class Setting:
    network: Network
    path: AffinePath = field(default_factory=LinearPath)

    @property
    def flow_map(self) -> TwoTimeMap:
        return TwoTimeMap(self.network, self.path)

    x = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1.0, 0.75, 0.5])
    s = torch.tensor([0.75, 0.5, 0.25])


@pytest.mark.parametrize("name", NAMES)
class TestEveryTransition:
    def test_spends_the_calls_it_declares(self, name: str) -> None:
        given, config = Setting(Network()), stochasticizers.config(name)
        assert isinstance(config, StochasticizerConfig)
        stochasticizers.build(name).transition(given.flow_map, given.x, given.t, given.s, unconditional(3))
        assert given.network.calls == config.requires().calls

    def test_replays_to_the_same_density_bit_for_bit(self, name: str) -> None:
        """Identity 4: the rollout and the objective call one method, so the ratio starts at exactly 1."""
        given, policy = Setting(Network()), stochasticizers.build(name)
        step = (given.flow_map, given.x, given.t, given.s, unconditional(3))
        with torch.no_grad():
            drawn = policy.transition(*step)
            x_s = drawn.push(torch.randn(given.x.shape, generator=torch.Generator().manual_seed(1)))
        replayed = policy.transition(*step)
        assert torch.equal(replayed.log_prob(x_s).detach(), drawn.log_prob(x_s))

    def test_mean_carries_the_gradient_and_std_does_not(self, name: str) -> None:
        given = Setting(Network())
        density = stochasticizers.build(name).transition(given.flow_map, given.x, given.t, given.s, unconditional(3))
        assert not density.std.requires_grad
        density.log_prob(torch.zeros_like(given.x)).sum().backward()
        gradient = given.network.mix.weight.grad
        assert gradient is not None
        assert float(gradient.abs().min()) > 0

    def test_is_fp32_around_a_bf16_network(self, name: str) -> None:
        given = Setting(Network(torch.bfloat16))
        density = stochasticizers.build(name).transition(
            given.flow_map, given.x.bfloat16(), given.t, given.s, unconditional(3)
        )
        assert (density.mean.dtype, density.std.dtype) == (torch.float32, torch.float32)
        assert density.mean.shape == given.x.shape

    @pytest.mark.parametrize(("t", "s"), [(0.5, 0.0), (0.5, 0.5), (0.5, 0.6)])
    def test_needs_a_target_between_zero_and_the_start(self, name: str, t: float, s: float) -> None:
        with pytest.raises(ValueError, match="0 < s < t"):
            stochasticizers.build(name).transition(
                gaussian_map(LinearPath()), torch.zeros(2, 2), times(t, 2), times(s, 2), unconditional(2)
            )

    def test_refuses_times_of_another_shape(self, name: str) -> None:
        given = Setting(Network())
        for t, s in ((torch.tensor(1.0), torch.tensor(0.5)), (given.t, given.s[:1]), (given.t[:1], given.s[:1])):
            with pytest.raises(ValueError, match=r"shape|one value for each"):
                stochasticizers.build(name).transition(given.flow_map, given.x, t, s, unconditional(3))

    def test_refuses_maps_it_does_not_fit(self, name: str) -> None:
        given = Setting(Network())
        single = SingleTimeMap(lambda x, t, cond: x, LinearPath())
        step = (given.x, given.t, given.s, unconditional(3))
        if name != "asfmc-endpoint":
            with pytest.raises(CompositionError, match="single-time"):
                stochasticizers.build(name).transition(single, *step)
        if name in LINEAR_ONLY:
            with pytest.raises(CompositionError, match=f"'{name}' is defined on the linear path"):
                stochasticizers.build(name).transition(TwoTimeMap(given.network, TrigPath()), *step)


def test_endpoint_kernel_works_on_a_single_time_map() -> None:
    given, path = Setting(Network()), TrigPath()
    single = SingleTimeMap(lambda x, t, cond: given.network(x, t, 0 * t, cond), path)
    density = stochasticizers.build("asfmc-endpoint").transition(single, given.x, given.t, given.s, unconditional(3))
    torch.testing.assert_close(density.std, path.sigma(given.s))


def test_euler_form_refuses_targets_at_or_below_epsilon() -> None:
    policy = stochasticizers.build("asfmc-euler", {"epsilon": 0.05})
    with pytest.raises(CompositionError, match=r"cannot step to the time 0\.05"):
        policy.transition(
            gaussian_map(LinearPath()), torch.zeros(2, 2), times(0.3, 2), times(0.05, 2), unconditional(2)
        )


def test_detached_velocity_changes_the_gradient_only() -> None:
    given = Setting(Network())
    gradients, means = [], []
    for detach in (False, True):
        policy = stochasticizers.build("asfmc-euler", {"detach_velocity": detach})
        density = policy.transition(given.flow_map, given.x, given.t, given.s, unconditional(3))
        gradients.append(torch.autograd.grad(density.mean.sum(), given.network.mix.weight)[0])
        means.append(density.mean.detach())
    assert torch.equal(*means)
    assert not torch.allclose(*gradients)
