"""A complete Z-Image folder of about a megabyte with random weights: every class of the real one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor

from tests.support.families import FamilyCase
from tests.tiny_qwen import WIDTH, qwen3, qwen_tokenizer

RESOLUTION = 32
SEQUENCE = 64


def build_tiny_zimage(folder: Path, seed: int = 0) -> Path:
    """Writes a Z-Image pipeline folder as it is published: nothing in it knows of flow maps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = ZImagePipeline(
            tokenizer=qwen_tokenizer(),
            text_encoder=qwen3(layers=2).model,
            vae=_autoencoder(),
            transformer=_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    pipeline.save_pretrained(str(folder))
    return folder


def _transformer() -> ZImageTransformer2DModel:
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 4],
        axes_lens=[256, 32, 32],
    )
    # as made, the padding of prompts would be zero, and what pads them could not be told apart
    torch.nn.init.normal_(model.cap_pad_token)
    torch.nn.init.normal_(model.x_pad_token)
    return model


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _pipeline(folder: Path) -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sampled(pipeline: ZImagePipeline, prompts: list[str], noise: Tensor, steps: int, output: str) -> Tensor:
    drawn: Tensor = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=0.0,
        latents=noise,
        height=RESOLUTION,
        width=RESOLUTION,
        max_sequence_length=SEQUENCE,
        output_type=output,
    ).images
    return drawn


def _embeddings(folder: Path, model: Any, prompts: list[str]) -> Mapping[str, Tensor]:
    with torch.no_grad():
        rows, _ = _pipeline(folder).encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=SEQUENCE
        )
    mask = torch.stack([torch.arange(SEQUENCE) < len(row) for row in rows]).long()
    # what the pipeline drops, the padding, is taken from the model itself
    tokens = model.components.text.embed(prompts, SEQUENCE)["tokens"].clone()
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return {"tokens": tokens, "mask": mask}


def _images(folder: Path, model: Any, latents: Tensor) -> Tensor:
    pipeline = _pipeline(folder)
    config = pipeline.vae.config
    decoded = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    images: Tensor = pipeline.image_processor.postprocess(decoded, output_type="pt")
    return images


def _draw(folder: Path, adapter: Path, prompt: str, noise: Tensor) -> Tensor:
    pipeline = _pipeline(folder)
    pipeline.load_lora_weights(adapter)
    return _sampled(pipeline, [prompt], noise, 1, "pt")


Z_IMAGE_CASE = FamilyCase(
    model="z-image-turbo",
    build=lambda folder: {
        "folder": str(build_tiny_zimage(folder)),
        "resolution": RESOLUTION,
        "max_sequence_length": SEQUENCE,
    },
    latents=lambda folder, model, prompts, noise, steps: _sampled(_pipeline(folder), prompts, noise, steps, "latent"),
    embeddings=_embeddings,
    images=_images,
    draw=_draw,
    # q, k, v and out of two layers and two refiners; three of each feed-forward
    adapted=16,
    attention_mlp=28,
    dropped="cap_pad_token",
    mismatch=("transformer", {"cap_feat_dim": 32}, "has shape"),
)
