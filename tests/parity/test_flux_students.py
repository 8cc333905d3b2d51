"""The published students against diffusers: schedulers that step them, and a forward written out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SCMScheduler,
)
from torch import Tensor, nn

from fmg.core.types import Conditioning
from fmg.flow import make_grid
from fmg.flow.sampling import native_sample
from fmg.models.flux.latents import pack, unpack
from fmg.models.flux.model import FluxModel
from fmg.registry import models
from tests.support.trigflow import trigflow_prediction
from tests.tiny_flux import RESOLUTION, SEQUENCE, build_tiny_teacher, publish_student

CPU = torch.device("cpu")
STEPS = [1, 2, 4, 5]
GUIDANCE = 3.5
SIGMA_DATA = 0.5
ROWS = 2


def _student(name: str, folder: Path) -> FluxModel:
    second = "none" if name == "scm-flux" else "duration"
    options = {
        "student": str(publish_student(folder / "student.pt", second)),  # type: ignore[arg-type]
        "teacher": str(build_tiny_teacher(folder / "teacher")),
        "time_scale": 1.0,
        "guidance": GUIDANCE,
        "resolution": RESOLUTION,
        "max_sequence_length": SEQUENCE,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMG_CACHE", str(folder / "cache"))
        return models.build(name, options).load(CPU, torch.float32)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def meanflow(tmp_path_factory: pytest.TempPathFactory) -> FluxModel:
    return _student("meanflow-flux", tmp_path_factory.mktemp("meanflow"))


@pytest.fixture(scope="module")
def scm(tmp_path_factory: pytest.TempPathFactory) -> FluxModel:
    return _student("scm-flux", tmp_path_factory.mktemp("scm"))


def _cond(model: FluxModel) -> Conditioning:
    return model.encode(["a red circle left", "a blue square"])


def _noise(model: FluxModel, seed: int) -> Tensor:
    return torch.randn(ROWS, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def _no_noise(_: int) -> Tensor:
    raise AssertionError("a two-time map asked for noise")


def _network(model: FluxModel, x: Tensor, t: Tensor, s: Tensor | None) -> Tensor:
    """The transformer called as a pipeline would."""
    cond = _cond(model)
    height, width = x.shape[-2:]
    output: Tensor = model.components.transformer(
        hidden_states=pack(x),
        encoder_hidden_states=cond.tensors["tokens"],
        pooled_projections=cond.tensors["pooled"],
        timestep=t.float().expand(ROWS),
        second=None if s is None else s.float().expand(ROWS),
        guidance=torch.full((ROWS,), GUIDANCE),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, CPU, torch.float32),
        txt_ids=torch.zeros(SEQUENCE, 3),
    )[0]
    return unpack(output, height, width)


@torch.no_grad()
@pytest.mark.parametrize("steps", STEPS)
def test_meanflow_steps_as_flow_match_euler_with_dynamic_shift(meanflow: FluxModel, steps: int) -> None:
    tokens = (meanflow.latent_shape[1] // 2) ** 2
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    x = _noise(meanflow, 0)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = _network(meanflow, x, scheduler.sigmas[i], scheduler.sigmas[i + 1])
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    times = make_grid("flux-shift", steps, image_tokens=tokens)
    ours = native_sample(meanflow.flow_map, _cond(meanflow), _noise(meanflow, 0), times, _no_noise)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("steps", STEPS)
def test_meanflow_steps_as_flow_map_euler_with_shift(meanflow: FluxModel, steps: int) -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    x = _noise(meanflow, 0)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = _network(meanflow, x, scheduler.sigmas[i], scheduler.sigmas[i + 1])
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    times = scheduler.sigmas.tolist()
    ours = native_sample(meanflow.flow_map, _cond(meanflow), _noise(meanflow, 0), times, _no_noise)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("steps", STEPS)
def test_scm_steps_as_the_scm_scheduler_with_the_trigflow_wrapper(scm: FluxModel, steps: int) -> None:
    scheduler = SCMScheduler(sigma_data=SIGMA_DATA)
    # its own default starts 3.7e-6 above pi/2
    scheduler.set_timesteps(steps, max_timesteps=math.pi / 2, intermediate_timesteps=1.3 if steps == 2 else None)

    def network(z: Tensor, s: Tensor) -> Tensor:
        return _network(scm, z, s, None)

    x, clean = SIGMA_DATA * _noise(scm, 0), torch.empty(0)
    for i, angle in enumerate(scheduler.timesteps[:-1]):
        prediction = SIGMA_DATA * trigflow_prediction(network, x, angle.expand(ROWS), SIGMA_DATA)
        fresh = torch.Generator().manual_seed(1 + i)
        x, clean = scheduler.step(prediction, angle, x, generator=fresh, return_dict=False)
    times = make_grid("scm", steps)
    ours = native_sample(scm.flow_map, _cond(scm), _noise(scm, 0), times, lambda k: _noise(scm, 1 + k))
    torch.testing.assert_close(SIGMA_DATA * ours, clean, rtol=0, atol=1e-5)


class Given(nn.Module):
    """Replaces `time_text_embed` and returns a value that was computed outside."""

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, *_: Tensor) -> Tensor:
        return self.embedding


def _embed(weights: dict[str, Tensor], prefix: str, inputs: Tensor) -> Tensor:
    hidden = nn.functional.linear(inputs, weights[f"{prefix}.linear_1.weight"], weights[f"{prefix}.linear_1.bias"])
    hidden = nn.functional.silu(hidden)
    return nn.functional.linear(hidden, weights[f"{prefix}.linear_2.weight"], weights[f"{prefix}.linear_2.bias"])


def _sinusoid(value: Tensor) -> Tensor:
    angles = value[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["meanflow", "scm"])
def test_the_forward_is_the_stock_one_under_the_embedding_of_unscaled_times(
    name: str, request: pytest.FixtureRequest
) -> None:
    """`time_text_embed(t, guidance, pooled) + timestep_embedder2(t - r)` at x 1, written out; the blocks are stock."""
    model: FluxModel = request.getfixturevalue(name)
    transformer, cond = model.components.transformer, _cond(model)
    weights = transformer.state_dict()
    t, r = torch.tensor([0.9, 0.35]), torch.tensor([0.2, 0.35])
    embedding = _embed(weights, "time_text_embed.timestep_embedder", _sinusoid(t))
    embedding += _embed(weights, "time_text_embed.guidance_embedder", _sinusoid(torch.full((ROWS,), GUIDANCE)))
    embedding += _embed(weights, "time_text_embed.text_embedder", cond.tensors["pooled"])
    if name == "meanflow":
        embedding += _embed(weights, "timestep_embedder2", _sinusoid(t - r))
    config: dict[str, Any] = {k: v for k, v in transformer.config.items() if k not in ("time_scale", "second_time")}
    stock = FluxTransformer2DModel.from_config(config).eval()
    stock.load_state_dict({k: v for k, v in weights.items() if not k.startswith("timestep_embedder2")})
    stock.time_text_embed = Given(embedding)
    x = _noise(model, 0)
    height, width = x.shape[-2:]
    expected = stock(
        hidden_states=pack(x),
        encoder_hidden_states=cond.tensors["tokens"],
        pooled_projections=cond.tensors["pooled"],
        timestep=t,
        guidance=torch.full((ROWS,), GUIDANCE),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, CPU, torch.float32),
        txt_ids=torch.zeros(SEQUENCE, 3),
        return_dict=False,
    )[0]
    target = r if name == "meanflow" else torch.zeros(ROWS)
    jumped = model.flow_map.jump(x, t, target, cond)
    velocity = unpack(expected, height, width)
    torch.testing.assert_close(jumped, x - (t - target)[:, None, None, None] * velocity, rtol=0, atol=1e-6)
