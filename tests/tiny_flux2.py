"""A complete FLUX.2 [klein] folder of about a megabyte with random weights: every class of the real one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor

from fmg.models.flux.latents import unpack
from tests.support.families import FamilyCase
from tests.tiny_qwen import WIDTH, qwen3, qwen_tokenizer

RESOLUTION = 32
SEQUENCE = 64
_CHANNELS = 4


def build_tiny_flux2(folder: Path, seed: int = 0) -> Path:
    """Writes a FLUX.2 [klein] pipeline folder as it is published: nothing in it knows of flow maps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = Flux2KleinPipeline(
            tokenizer=qwen_tokenizer(),
            text_encoder=qwen3(),
            vae=flux2_autoencoder(),
            transformer=flux2_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            is_distilled=True,
        )
    pipeline.save_pretrained(str(folder))
    return folder


def flux2_transformer() -> Flux2Transformer2DModel:
    """One double-stream and two single-stream blocks."""
    return Flux2Transformer2DModel(
        in_channels=4 * _CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def flux2_autoencoder() -> AutoencoderKLFlux2:
    """One whose latents have a mean and a std for each channel of a patch."""
    model = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=_CHANNELS,
        norm_num_groups=4,
        sample_size=RESOLUTION,
    )
    torch.nn.init.normal_(model.bn.running_mean)
    torch.nn.init.uniform_(model.bn.running_var, 0.5, 3.0)
    return model


def _pipeline(folder: Path) -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sampled(pipeline: Flux2KleinPipeline, prompts: list[str], noise: Tensor, steps: int, output: str) -> Tensor:
    drawn: Tensor = pipeline(
        prompt=prompts,
        num_inference_steps=steps,
        guidance_scale=1.0,
        latents=pipeline._patchify_latents(noise),
        height=RESOLUTION,
        width=RESOLUTION,
        max_sequence_length=SEQUENCE,
        output_type=output,
    ).images
    return drawn


def _latents(folder: Path, model: Any, prompts: list[str], noise: Tensor, steps: int) -> Tensor:
    """The pipeline's latents as they leave its last step, before it undoes their normalisation."""
    pipeline, kept = _pipeline(folder), {}

    def keep(_: object, step: int, time: object, given: dict[str, Tensor]) -> dict[str, Tensor]:
        kept["latents"] = given["latents"]
        return given

    pipeline(
        prompt=prompts,
        num_inference_steps=steps,
        guidance_scale=1.0,
        latents=pipeline._patchify_latents(noise),
        height=RESOLUTION,
        width=RESOLUTION,
        max_sequence_length=SEQUENCE,
        output_type="latent",
        callback_on_step_end=keep,
    )
    return unpack(kept["latents"], *noise.shape[-2:])


def _embeddings(folder: Path, model: Any, prompts: list[str]) -> Mapping[str, Tensor]:
    with torch.no_grad():
        return {"tokens": _pipeline(folder).encode_prompt(list(prompts), max_sequence_length=SEQUENCE)[0]}


def flux2_images(vae: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """What the pipelines decode from normalised latents, in [0, 1]."""
    mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    patched = Flux2KleinPipeline._patchify_latents(latents) * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    decoded = vae.decode(Flux2KleinPipeline._unpatchify_latents(patched), return_dict=False)[0]
    return (decoded / 2 + 0.5).clamp(0, 1)


def _draw(folder: Path, adapter: Path, prompt: str, noise: Tensor) -> Tensor:
    pipeline = _pipeline(folder)
    pipeline.load_lora_weights(adapter)
    return _sampled(pipeline, [prompt], noise, 1, "pt")


FLUX2_CASE = FamilyCase(
    model="flux2-klein",
    build=lambda folder: {
        "folder": str(build_tiny_flux2(folder)),
        "resolution": RESOLUTION,
        "max_sequence_length": SEQUENCE,
    },
    latents=_latents,
    embeddings=_embeddings,
    images=lambda folder, model, latents: flux2_images(_pipeline(folder).vae, latents),
    draw=_draw,
    # eight of attention in the double block, and both matrices of each single block; two of each feed-forward
    adapted=8 + 2 * 2,
    attention_mlp=12 + 2 * 2,
    dropped="context_embedder",
    mismatch=("transformer", {"joint_attention_dim": 32}, "has shape"),
)
