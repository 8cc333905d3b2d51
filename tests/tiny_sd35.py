"""A complete SD3.5 folder of about a megabyte with random weights, and the three adapters that make it a flow map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from fmg.models.sd3.model import FlowMapSD3Transformer2DModel
from tests.support.families import FamilyCase
from tests.tiny_flux import clip_tokenizer, t5, t5_tokenizer

RESOLUTION, SEQUENCE, WIDTH = 64, 12, 32
GATE, RANK, ALPHA = 0.25, 2, 4.0
STAGES = 3
IMAGE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")


def build_tiny_sd35(folder: Path, seed: int = 0) -> Path:
    """Writes an SD3.5 pipeline folder as it is published: nothing in it knows of flow maps."""
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**_SIZES),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(),
            text_encoder=_clip(len(tokenizer), 10),
            tokenizer=tokenizer,
            text_encoder_2=_clip(len(tokenizer), 14),
            tokenizer_2=tokenizer,
            text_encoder_3=t5(tokenizer_3),
            tokenizer_3=tokenizer_3,
        )
    pipeline.save_pretrained(str(folder))
    return folder


def write_stages(folder: Path, into: Path) -> list[Path]:
    """The files of three stages as MeanFlowNFT's trainers save them: LoRA and the whole embedder, in fp32."""
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    linears = {name: m for name, m in transformer.named_modules() if name.endswith(IMAGE + TEXT)}
    inner = transformer.inner_dim
    files = []
    for stage in range(STAGES):
        generator = torch.Generator().manual_seed(stage)
        state: dict[str, Tensor] = {}
        for name, linear in linears.items():
            for side, shape in (("A", (RANK, linear.in_features)), ("B", (linear.out_features, RANK))):
                state[f"{name}.lora_{side}.default.weight"] = torch.randn(shape, generator=generator) / 8
        for layer, inputs in (("linear_1", 256), ("linear_2", inner)):
            place = f"time_text_embed.delta_embedder.{layer}"
            state[f"{place}.weight"] = torch.randn(inner, inputs, generator=generator) / inputs**0.5
            state[f"{place}.bias"] = torch.randn(inner, generator=generator)
        files.append(into / f"stage{stage + 1}.pt")
        torch.save({"state_dict": state} if stage == 1 else state, files[-1])
    return files


def sd35_options(folder: Path) -> dict[str, object]:
    """The options of a tiny folder with all stages, both written here."""
    files = write_stages(build_tiny_sd35(folder), folder)
    return {
        "folder": str(folder),
        "second_time": {"takes": "target", "gate": GATE},
        "adapters": [{"source": str(file), "alpha": ALPHA} for file in files],
        "resolution": RESOLUTION,
        "max_sequence_length": SEQUENCE,
    }


class PublishedTimes(nn.Module):
    """The time embedding of AnyFlow, written out: it finds the second time in the scheduler of the pipeline."""

    def __init__(self, stock: Any, delta: TimestepEmbedding, scheduler: Any) -> None:
        super().__init__()
        self.stock, self.delta, self.scheduler = stock, delta, scheduler
        self.project = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        times = [*self.scheduler.timesteps.tolist(), 0.0]
        following = torch.tensor([times[times.index(float(t)) + 1] for t in timestep])
        first = self.stock.timestep_embedder(self.project(timestep))
        second = self.delta(self.project(following))
        mixed: Tensor = (1 - GATE) * first + GATE * second + self.stock.text_embedder(pooled)
        return mixed


def published_pipeline(folder: Path, stages: int = STAGES) -> StableDiffusion3Pipeline:
    """The stock pipeline with the stages merged by hand, one after another, and the published time embedding."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    transformer = pipeline.transformer
    modules = dict(transformer.named_modules())
    delta = TimestepEmbedding(256, transformer.inner_dim)
    for stage in range(stages):
        state = torch.load(folder / f"stage{stage + 1}.pt")
        state = state.get("state_dict", state)
        for name in {key.partition(".lora_")[0] for key in state if ".lora_" in key}:
            a, b = (state[f"{name}.lora_{side}.default.weight"] for side in "AB")
            modules[name].weight.data += ALPHA / RANK * b @ a
        own = {key.partition("delta_embedder.")[2]: x for key, x in state.items() if "delta_embedder" in key}
        delta.load_state_dict(own)
    transformer.time_text_embed = PublishedTimes(transformer.time_text_embed, delta, pipeline.scheduler)
    return pipeline


def sampled(pipeline: StableDiffusion3Pipeline, prompts: list[str], noise: Tensor, steps: int, output: str) -> Tensor:
    """What the pipeline samples without CFG on equal steps, which its scheduler shifts."""
    drawn: Tensor = pipeline(
        prompts,
        sigmas=np.linspace(1.0, 1 / steps, steps).tolist(),
        guidance_scale=1.0,
        latents=noise,
        height=RESOLUTION,
        width=RESOLUTION,
        max_sequence_length=SEQUENCE,
        output_type=output,
    ).images
    return drawn


def _embeddings(folder: Path, model: Any, prompts: list[str]) -> Mapping[str, Tensor]:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=SEQUENCE
        )
    return {"tokens": tokens, "pooled": pooled}


def _images(folder: Path, model: Any, latents: Tensor) -> Tensor:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    config = pipeline.vae.config
    decoded = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    images: Tensor = pipeline.image_processor.postprocess(decoded, output_type="pt")
    return images


def _draw(folder: Path, adapter: Path, prompt: str, noise: Tensor) -> Tensor:
    pipeline = published_pipeline(folder)
    pipeline.load_lora_weights(adapter)
    return sampled(pipeline, [prompt], noise, 1, "pt")


_SIZES: Mapping[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


def flow_map_transformer() -> FlowMapSD3Transformer2DModel:
    """The transformer of the folder with its second time, random."""
    return FlowMapSD3Transformer2DModel(**_SIZES, time_scale=1000.0, second_time={"takes": "target", "gate": GATE})


def _clip(vocabulary: int, width: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            projection_dim=width,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


SD35_CASE = FamilyCase(
    model="sd35-meanflow",
    build=sd35_options,
    latents=lambda folder, model, prompts, noise, steps: sampled(
        published_pipeline(folder), prompts, noise, steps, "latent"
    ),
    embeddings=_embeddings,
    images=_images,
    draw=_draw,
    # four of each stream in three blocks, the last of which has no output for text; four of the image alone in one
    adapted=3 * 8 - 1 + 4,
    attention_mlp=3 * 8 - 1 + 4 + 3 * 4 - 2,
    dropped="context_embedder",
    mismatch=("transformer", {"pooled_projection_dim": 20}, "has shape"),
)
