"""A complete FLUX.3 [klein] folder of about a megabyte with random weights: every class of the real one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux3Transformer2DModel
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.flux3 import Flux3DistilledModularPipeline
from diffusers.modular_pipelines.flux3.decoders import Flux3DecodeStep
from diffusers.modular_pipelines.flux3.encoders import Flux3DistilledTextEncoderStep
from diffusers.modular_pipelines.flux3.modular_blocks_flux3_distilled import Flux3DistilledCoreDenoiseStep
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

from tests.support.families import FamilyCase
from tests.tiny_flux2 import flux2_autoencoder, flux2_images
from tests.tiny_qwen import WIDTH, qwen3_vl, qwen_tokenizer

RESOLUTION = 32
SEQUENCE = 80
_CHANNELS = 4


def build_tiny_flux3(folder: Path, seed: int = 0) -> Path:
    """Writes the components of a FLUX.3 [klein] folder as they are published: nothing in it knows of flow maps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {"text_encoder": qwen3_vl(), "vae": flux2_autoencoder(), "transformer": flux3_transformer()}
    for name, part in {**parts, "tokenizer": qwen_tokenizer()}.items():
        part.save_pretrained(str(folder / name))
    return folder


def flux3_transformer() -> Flux3Transformer2DModel:
    """One block for each mode and two joint ones."""
    return Flux3Transformer2DModel(
        in_channels=4 * _CHANNELS,
        cond_in_channels=4 * _CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8 * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        flow_map=True,
    )


def _pipeline(folder: Path) -> Flux3DistilledModularPipeline:
    """The blocks of the stock pipeline after its text encoder, which takes one prompt a call."""
    steps = {"denoise": Flux3DistilledCoreDenoiseStep(), "decode": Flux3DecodeStep()}
    pipeline = Flux3DistilledModularPipeline(blocks=SequentialPipelineBlocks.from_blocks_dict(steps))
    transformer = Flux3Transformer2DModel.from_pretrained(folder / "transformer")
    pipeline.update_components(transformer=transformer, vae=AutoencoderKLFlux2.from_pretrained(folder / "vae"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sampled(
    pipeline: Flux3DistilledModularPipeline, folder: Path, prompts: list[str], noise: Tensor, steps: int, output: str
) -> Tensor:
    state = pipeline(
        prompt_embeds=_embeddings(folder, None, prompts)["tokens"],
        latents=Flux2KleinPipeline._patchify_latents(noise),
        num_inference_steps=steps,
        height=RESOLUTION,
        width=RESOLUTION,
        output_type="pt",
    )
    sampled: Tensor = state.get(output)
    return sampled


def _latents(folder: Path, model: Any, prompts: list[str], noise: Tensor, steps: int) -> Tensor:
    """The normalised latents of the denoising blocks."""
    sampled = _sampled(_pipeline(folder), folder, prompts, noise, steps, "latents")
    unpatched: Tensor = Flux2KleinPipeline._unpatchify_latents(sampled)
    return unpatched


@torch.no_grad()
def _embeddings(folder: Path, model: Any, prompts: list[str]) -> Mapping[str, Tensor]:
    """What the text encoder's block makes of prompts of at most one window."""
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    # a processor for images, which the pipeline loads, would need torchvision
    processor = SimpleNamespace(tokenizer=tokenizer, apply_chat_template=tokenizer.apply_chat_template)
    encoder = Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval()
    rows = [
        Flux3DistilledTextEncoderStep._get_qwen3_vl_prompt_embeds(
            encoder, processor, prompt, max_sequence_length=SEQUENCE
        )
        for prompt in prompts
    ]
    return {"tokens": torch.cat(rows)}


def _draw(folder: Path, adapter: Path, prompt: str, noise: Tensor) -> Tensor:
    pipeline = _pipeline(folder)
    pipeline.load_lora_weights(adapter)
    return _sampled(pipeline, folder, [prompt], noise, 1, "images")


FLUX3_CASE = FamilyCase(
    model="flux3-klein",
    build=lambda folder: {
        "folder": str(build_tiny_flux3(folder)),
        "resolution": RESOLUTION,
        "max_sequence_length": SEQUENCE,
    },
    latents=_latents,
    embeddings=_embeddings,
    images=lambda folder, model, latents: flux2_images(_pipeline(folder).vae, latents),
    draw=_draw,
    # four of attention and two of the feed-forward in the blocks of image, text and both; none in those of references
    adapted=4 * 4,
    attention_mlp=4 * 6,
    dropped="target_timestep_embedder",
    mismatch=("transformer", {"joint_attention_dim": 32}, "has shape"),
)
