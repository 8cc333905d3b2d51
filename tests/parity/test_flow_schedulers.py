"""Grids and transitions against the schedulers of diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SCMScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from fmg.flow import LinearPath, SingleTimeMap, make_grid
from fmg.registry import stochasticizers
from tests.support.analytic import unconditional
from tests.support.trigflow import trigflow_prediction

SIGMA_DATA = 0.5


@pytest.mark.parametrize(("tokens", "steps"), [(1024, 4), (4096, 4), (256, 1), (1600, 28)])
def test_flux_shift_is_dynamic_shifting(tokens: int, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    shift = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=shift)
    assert make_grid("flux-shift", steps, image_tokens=tokens) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("shift", [1.5, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 28])
def test_a_static_shift_is_that_of_the_scheduler_on_equal_steps(shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    assert make_grid(f"shift-{shift:g}", steps) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize(("tokens", "steps"), [(1024, 4), (4096, 4), (256, 1), (4096, 50), (4300, 8), (4301, 8)])
def test_flux2_shift_is_that_of_its_pipeline(tokens: int, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=compute_empirical_mu(tokens, steps))
    assert make_grid("flux2-shift", steps, image_tokens=tokens) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_scm_grid_is_the_scheduler_s_angles(steps: int) -> None:
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    angles = scheduler.timesteps
    expected = (angles.sin() / (angles.sin() + angles.cos())).tolist()
    assert make_grid("scm", steps) == pytest.approx(expected, abs=1e-5)


def network(z: Tensor, s: Tensor) -> Tensor:
    return torch.tanh(1.3 * z + s[:, None]) + 0.5 * z.flip(1)


def test_two_scm_steps_are_two_endpoint_transitions() -> None:
    """Identity 8: SCMScheduler with the TrigFlow wrapper is `z - s net(z, s)` and re-noising, in other coordinates."""
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    fresh = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    scheduler = SCMScheduler(sigma_data=SIGMA_DATA)
    # its own default starts 3.7e-6 above pi/2
    scheduler.set_timesteps(2, max_timesteps=math.pi / 2)
    x = SIGMA_DATA * noise
    for angle in scheduler.timesteps[:-1]:
        prediction = SIGMA_DATA * trigflow_prediction(network, x, angle.expand(5), SIGMA_DATA)
        x, denoised = scheduler.step(
            prediction, angle, x, generator=torch.Generator().manual_seed(1), return_dict=False
        )

    flow_map = SingleTimeMap(lambda z, s, cond: network(z, s), LinearPath())
    first, middle, last = (torch.full((5,), time) for time in make_grid("scm", 2))
    policy = stochasticizers.build("asfmc-endpoint")
    z = policy.transition(flow_map, noise, first, middle, unconditional(5)).push(fresh)
    clean = flow_map.jump(z, middle, last, unconditional(5))
    torch.testing.assert_close(denoised, SIGMA_DATA * clean, rtol=1e-5, atol=1e-5)
