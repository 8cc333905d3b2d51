from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fmg.core.errors import CompositionError
from fmg.core.protocols import FlowMap
from fmg.core.types import Conditioning
from fmg.flow import LinearPath, SingleTimeMap, TrigFlowMap, TwoTimeMap
from tests.support.analytic import unconditional


class TwoTimeNetwork(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, dtype=dtype)
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
        self.times = [t, s]
        hidden: Tensor = self.linear(x.flatten(1).to(self.linear.weight.dtype))
        return hidden.reshape(x.shape) * (1 + t - s)[:, None, None].to(hidden.dtype)


def test_jump_and_velocity_go_through_call_so_that_hooks_fire() -> None:
    network, calls = TwoTimeNetwork(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    flow_map, x = TwoTimeMap(network, LinearPath()), torch.randn(2, 2, 3)
    flow_map.jump(x, torch.ones(2), torch.zeros(2), unconditional(2))
    flow_map.velocity(x, torch.ones(2), unconditional(2))
    assert len(calls) == 2


def test_times_stay_fp32_beside_a_bf16_network() -> None:
    network = TwoTimeNetwork(torch.bfloat16)
    t, s = torch.full((2,), 0.7625), torch.full((2,), 0.2875)
    moved = TwoTimeMap(network, LinearPath()).jump(torch.randn(2, 2, 3), t, s, unconditional(2))
    assert torch.equal(torch.stack(network.times), torch.stack([t, s]))
    assert moved.dtype == torch.float32


def test_jump_to_the_same_time_is_the_identity() -> None:
    x, t = torch.randn(3, 2, 3), torch.tensor([0.2, 0.7, 1.0])
    assert torch.equal(TwoTimeMap(TwoTimeNetwork(), LinearPath()).jump(x, t, t, unconditional(3)), x)


@pytest.mark.parametrize(
    "flow_map", [SingleTimeMap(lambda x, t, cond: x, LinearPath()), TrigFlowMap(lambda x, t, cond: x)]
)
def test_single_time_map_refuses_what_it_does_not_know(flow_map: FlowMap) -> None:
    x, t = torch.ones(2, 3), torch.ones(2)
    with pytest.raises(CompositionError, match=r"jumps to 0 only, not to 0\.25"):
        flow_map.jump(x, t, torch.tensor([0.0, 0.25]), unconditional(2))
    with pytest.raises(CompositionError, match="no diagonal velocity"):
        flow_map.velocity(x, t, unconditional(2))


def test_scalar_times_are_refused() -> None:
    with pytest.raises(ValueError, match="one value for each"):
        TwoTimeMap(TwoTimeNetwork(), LinearPath()).jump(
            torch.ones(2, 2, 3), torch.ones(1), torch.zeros(1), unconditional(2)
        )


def test_both_are_flow_maps() -> None:
    two: FlowMap = TwoTimeMap(TwoTimeNetwork(), LinearPath())
    one: FlowMap = SingleTimeMap(lambda x, t, cond: x, LinearPath())
    assert (two.anchors, one.anchors) == ("any", "endpoint")
    assert isinstance(two, FlowMap)
    assert isinstance(one, FlowMap)
    trig: FlowMap = TrigFlowMap(lambda x, t, cond: x)
    assert (trig.anchors, trig.path.name) == ("endpoint", "trig")
    assert isinstance(trig, FlowMap)


@pytest.mark.compile
def test_both_times_are_inputs_of_an_exported_graph() -> None:
    """A time hidden in an attribute would be baked in as a constant; here other times give other results."""

    class Jump(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(3, 3)

        def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            def network(x: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
                return self.network(x) * (t + 2 * s)[:, None]

            return TwoTimeMap(network, LinearPath()).jump(x, t, s, unconditional(2))

    module, x = Jump(), torch.randn(2, 3)
    graph = torch.export.export(module, (x, torch.ones(2), torch.zeros(2))).module()
    for t, s in ((1.0, 0.0), (0.8, 0.3)):
        arguments = (x, torch.full((2,), t), torch.full((2,), s))
        torch.testing.assert_close(graph(*arguments), module(*arguments))
