from __future__ import annotations

import torch
from torch import nn

from fmg.training.ema import Ema, averaged_keys


def _walk(parameter: nn.Parameter, ema: Ema, steps: int) -> list[torch.Tensor]:
    values = []
    for step in range(steps):
        with torch.no_grad():
            parameter.add_(torch.full_like(parameter, 1.0 + step))
        ema.update()
        values.append(parameter.detach().clone())
    return values


def test_the_average_is_that_of_its_formula_with_warm_up() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = Ema([parameter], 0.5)
    expected = parameter.detach().clone()
    for n, value in enumerate(_walk(parameter, ema, 12), start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert torch.allclose(ema.values[0], expected, rtol=1e-6)


def test_a_late_average_is_not_the_first_weights() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    ema = Ema([parameter], 0.999)
    with torch.no_grad():
        parameter.fill_(1.0)
    for _ in range(30):
        ema.update()
    # without a warm-up it would still be 0.03
    assert float(ema.values[0]) > 0.9


def test_the_weights_come_back_bit_for_bit() -> None:
    parameter = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    ema = Ema([parameter], 0.9)
    _walk(parameter, ema, 3)
    weights, average = parameter.detach().clone(), ema.values[0].clone()
    with ema.in_place():
        assert torch.equal(parameter.detach(), average)
    assert torch.equal(parameter.detach(), weights)
    assert torch.equal(ema.values[0], average)


def test_a_restored_average_goes_on_as_if_never_stopped() -> None:
    whole, cut = (nn.Parameter(torch.tensor([1.0, 3.0])) for _ in range(2))
    one, two = Ema([whole], 0.9), Ema([cut], 0.9)
    _walk(whole, one, 4)
    _walk(cut, two, 4)
    again = Ema([cut], 0.9)
    again.restore([x.clone() for x in two.values], two.updates)
    _walk(whole, one, 4)
    _walk(cut, again, 4)
    assert torch.equal(one.values[0], again.values[0])


def test_keys_of_an_average_stand_beside_those_of_the_weights() -> None:
    metrics = {"eval/score": 0.5, "eval/score_se": 0.1, "time/eval_s": 3.0}
    assert averaged_keys(metrics) == {"eval_ema/score": 0.5, "eval_ema/score_se": 0.1}
