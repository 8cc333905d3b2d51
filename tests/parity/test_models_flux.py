"""The FLUX path against diffusers' own pipeline, scheduler and stock transformer."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from fmg.models.flux import latents
from fmg.models.flux.model import FluxModel
from tests.tiny_flux import RESOLUTION, SEQUENCE, build_tiny_flux

CPU = torch.device("cpu")
PROMPTS = ["a red circle left", "a blue square, curly “quotes” & more"]
LONG = ["a red circle " * 40, "left"]


def _model(folder: Path, guidance: bool, second_time: str) -> FluxModel:
    build_tiny_flux(folder, guidance_embeds=guidance, second_time=second_time)  # type: ignore[arg-type]
    return FluxModel.from_folder(folder, CPU, torch.float32, name="tiny")


def _pipeline(model: FluxModel) -> FluxPipeline:
    parts = model.components
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=parts.vae,
        text_encoder=parts.text.text_encoder,
        tokenizer=parts.text.tokenizer,
        text_encoder_2=parts.text.text_encoder_2,
        tokenizer_2=parts.text.tokenizer_2,
        transformer=parts.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "guided"])
def single_time(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FluxModel:
    return _model(tmp_path_factory.mktemp("single") / "flux", request.param, "none")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "guided"])
def two_time(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FluxModel:
    return _model(tmp_path_factory.mktemp("two") / "flux", request.param, "duration")


def _noise(model: FluxModel, rows: int = 2) -> Tensor:
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (6, 10)])
def test_packing_is_that_of_flux(height: int, width: int) -> None:
    x = torch.arange(2 * 3 * height * width, dtype=torch.float32).reshape(2, 3, height, width)
    packed = latents.pack(x)
    assert torch.equal(packed, FluxPipeline._pack_latents(x, 2, 3, height, width))
    assert torch.equal(latents.unpack(packed, height, width), x)
    ids = FluxPipeline._prepare_latent_image_ids(2, height // 2, width // 2, CPU, torch.float32)
    assert torch.equal(torch.from_numpy(latents.image_ids(height, width)), ids)


@pytest.mark.parametrize("prompts", [PROMPTS, LONG, ["", "a"]], ids=["plain", "too long", "empty"])
def test_prompts_are_encoded_as_by_the_pipeline(single_time: FluxModel, prompts: list[str]) -> None:
    tokens, pooled, _ = _pipeline(single_time).encode_prompt(prompts, max_sequence_length=SEQUENCE)
    cond = FluxModel(single_time.components, "fresh").encode(prompts)
    assert torch.equal(cond.tensors["tokens"], tokens)
    assert torch.equal(cond.tensors["pooled"], pooled)


@torch.no_grad()
def test_euler_steps_on_the_network_give_the_pipelines_image(single_time: FluxModel) -> None:
    noise, cond, sigmas = _noise(single_time), single_time.encode(PROMPTS), [1.0, 0.75, 0.5, 0.25, 0.0]
    expected = _pipeline(single_time)(
        prompt=PROMPTS,
        height=RESOLUTION,
        width=RESOLUTION,
        sigmas=sigmas[:-1],
        guidance_scale=3.5,
        latents=latents.pack(noise),
        max_sequence_length=SEQUENCE,
        output_type="pt",
    ).images
    x = noise
    for now, then in pairwise(sigmas):
        # X_{t->0} = x - t net gives the net that the pipeline reads as a velocity
        t = torch.full((2,), now)
        velocity = (x - single_time.flow_map.jump(x, t, torch.zeros(2), cond)) / now
        x = x - (now - then) * velocity
    assert torch.allclose(single_time.decode(x), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_deterministic_sampling_is_the_flow_match_euler_scheduler(two_time: FluxModel, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    transformer, cond = two_time.components.transformer, two_time.encode(PROMPTS)
    packed = latents.pack(_noise(two_time))
    guidance = torch.full((2,), 3.5) if transformer.config.guidance_embeds else None
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = transformer(
            hidden_states=packed,
            encoder_hidden_states=cond.tensors["tokens"],
            pooled_projections=cond.tensors["pooled"],
            timestep=scheduler.sigmas[i].expand(2),
            second=scheduler.sigmas[i + 1].expand(2),
            guidance=guidance,
            img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 4, CPU, torch.float32),
            txt_ids=torch.zeros(SEQUENCE, 3),
        )[0]
        packed = scheduler.step(velocity, timestep, packed, return_dict=False)[0]
    x = _noise(two_time)
    for now, then in pairwise(scheduler.sigmas):
        x = two_time.flow_map.jump(x, now.expand(2), then.expand(2), cond)
    assert torch.allclose(latents.pack(x), packed, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_network_is_the_stock_transformer_at_time_scale_1000(single_time: FluxModel) -> None:
    ours = single_time.components.transformer
    config = {key: value for key, value in ours.config.items() if key not in ("time_scale", "second_time")}
    stock = FluxTransformer2DModel.from_config(config).eval()
    stock.load_state_dict(ours.state_dict())
    noise, cond, t = _noise(single_time), single_time.encode(PROMPTS), torch.tensor([0.9, 0.3])
    expected = stock(
        hidden_states=latents.pack(noise),
        encoder_hidden_states=cond.tensors["tokens"],
        pooled_projections=cond.tensors["pooled"],
        timestep=t,
        guidance=torch.full((2,), 3.5) if ours.config.guidance_embeds else None,
        img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 4, CPU, torch.float32),
        txt_ids=torch.zeros(SEQUENCE, 3),
        return_dict=False,
    )[0]
    jumped = single_time.flow_map.jump(noise, t, torch.zeros(2), cond)
    assert torch.allclose(jumped, noise - t[:, None, None, None] * latents.unpack(expected, 8, 8), atol=1e-6)


@torch.no_grad()
def test_decoding_is_that_of_the_pipeline(single_time: FluxModel) -> None:
    x, vae = 3 * _noise(single_time), single_time.components.vae
    images = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    expected = _pipeline(single_time).image_processor.postprocess(images, output_type="pt")
    assert torch.allclose(single_time.decode(x), expected, atol=1e-6)
    assert expected.min() == 0 or expected.max() == 1, "the clamp was not reached"
