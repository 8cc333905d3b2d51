"""Complete FLUX folders of about a megabyte with random weights: every class of the real ones, none of the size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from fmg.models.conventions import CONVENTIONS_FILE
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel

WIDTH = 32
RESOLUTION = 64
SEQUENCE = 12


def build_tiny_flux(
    folder: Path,
    *,
    second_time: Literal["none", "duration", "target"] = "duration",
    guidance_embeds: bool = False,
    time_scale: float = 1000.0,
    seed: int = 0,
) -> Path:
    """Writes a FLUX pipeline folder with its `fmg_flow_map.json`; guidance is 3.5 where it is embedded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = _transformer(second_time, guidance_embeds=guidance_embeds, time_scale=time_scale)
        tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=_autoencoder(),
            text_encoder=_clip(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=t5(tokenizer_2),
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        )
    pipeline.save_pretrained(str(folder))
    conventions = {
        "schema": 1,
        "map": "single-time" if second_time == "none" else "two-time",
        "path": "linear",
        "time_scale": time_scale,
        "second_time": second_time,
        "resolution": RESOLUTION,
        "max_sequence_length": SEQUENCE,
        "default_steps": 4,
        "default_grid": "uniform",
        "guidance": 3.5 if guidance_embeds else None,
    }
    (folder / CONVENTIONS_FILE).write_text(json.dumps(conventions), encoding="utf-8")
    return folder


def build_tiny_teacher(folder: Path) -> Path:
    """A stock guidance-distilled FLUX pipeline folder, as a teacher is published: nothing in it knows of flow maps."""
    build_tiny_flux(folder, second_time="none", guidance_embeds=True)
    (folder / CONVENTIONS_FILE).unlink()
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    stock = {key: value for key, value in config.items() if key not in ("time_scale", "second_time")}
    file.write_text(json.dumps({**stock, "_class_name": "FluxTransformer2DModel"}), encoding="utf-8")
    return folder


def publish_student(file: Path, second_time: Literal["none", "duration"], seed: int = 1) -> Path:
    """A student in the form that T2I-Distill published: a torch file with the state dict under `module`.

    The single-time one has the head `logvar_linear` of its training.
    """
    tensors = student_tensors(second_time, seed)
    if second_time == "none":
        tensors["logvar_linear.weight"] = torch.zeros(1, 256)
    torch.save({"module": tensors}, file)
    return file


def student_options(folder: Path, second_time: Literal["none", "duration"]) -> dict[str, object]:
    """The options of a recipe for a student and its teacher, both written into `folder`."""
    return {
        "model.student": str(publish_student(folder / "student.pt", second_time)),
        "model.teacher": str(build_tiny_teacher(folder / "teacher")),
        "model.resolution": RESOLUTION,
        "model.max_sequence_length": SEQUENCE,
    }


def student_tensors(second_time: Literal["none", "duration"], seed: int = 1) -> dict[str, torch.Tensor]:
    """The state dict of a student of `build_tiny_teacher`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = _transformer(second_time, guidance_embeds=True, time_scale=1.0)
    return dict(transformer.state_dict())


def _transformer(second_time: str, *, guidance_embeds: bool, time_scale: float) -> FlowMapFluxTransformer2DModel:
    return FlowMapFluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(8, 12, 12),
        time_scale=time_scale,
        second_time=second_time,
    )


def store_in(folder: Path, dtype: torch.dtype) -> Path:
    """Rewrites the weights of every component in `dtype`."""
    for file in folder.rglob("*.safetensors"):
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def clip_tokenizer() -> CLIPTokenizer:
    alphabet = sorted(ByteLevel.alphabet())
    entries = [*alphabet, *(f"{char}</w>" for char in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = [(f"▁{word}", -1.0) for word in ("a", "red", "blue", "circle", "square", "left", "right")]
    return T5Tokenizer(vocab=special + words + [(chr(i), -3.0) for i in range(33, 127)], extra_ids=0)


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
