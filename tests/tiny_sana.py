"""A complete SANA-Sprint folder of about a megabyte with random weights: every class of the real one."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

RESOLUTION = 64
SEQUENCE = 12
_WIDTH = 32


def build_tiny_sana(folder: Path, seed: int = 0) -> Path:
    """Writes a SANA-Sprint pipeline folder as it is published: nothing in it knows of flow maps."""
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = SanaSprintPipeline(
            tokenizer=tokenizer,
            text_encoder=_gemma(len(tokenizer)),
            vae=_autoencoder(),
            transformer=_transformer(),
            scheduler=SCMScheduler(),
        )
    pipeline.save_pretrained(str(folder))
    return folder


def _transformer() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=_WIDTH,
        sample_size=2,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    )


def _tokenizer() -> GemmaTokenizer:
    """Words and bytes, with the special tokens of Gemma."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    entries = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(chr(i) for i in range(33, 127))]
    return GemmaTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=[], padding_side="right")


def _gemma(vocabulary: int) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=vocabulary,
            hidden_size=_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            max_position_embeddings=4096,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )


def _autoencoder() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        encoder_block_out_channels=(8, 8, 8, 8, 16, 16),
        decoder_block_out_channels=(8, 8, 8, 8, 16, 16),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 5 + ((5,),),
        decoder_qkv_multiscales=((),) * 5 + ((5,),),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
