"""Tokenizers, text encoders and the autoencoder (stage 1), whose decoder is trained to be robust to latent noise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fmg.models.flux.latents import PATCH, pack, unpack
from pretraining.optim import cosine
from pretraining.settings import AutoencoderSettings, TextSettings
from pretraining.world import World


@dataclass(frozen=True)
class Tokenizers:
    """The two tokenizers of a FLUX pipeline; each has the length to which its prompts are padded."""

    clip: CLIPTokenizer
    t5: T5Tokenizer

    def ids(self, prompts: Sequence[str]) -> tuple[Int[Tensor, "b clip"], Int[Tensor, "b t5"]]:
        """CLIP and T5 token ids, padded as `FluxPipeline` does (no attention mask reaches the T5 encoder)."""
        clip, t5 = (
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in (self.clip, self.t5)
        )
        return clip, t5


def build_tokenizers(world: World, settings: TextSettings) -> Tokenizers:
    """The world's words and pieces are one token each; other text falls back to characters, or to `<unk>` (T5)."""
    clip = _clip_tokenizer(world.clip_words(), settings.clip_length)
    return Tokenizers(clip, _t5_tokenizer(world.t5_pieces(), settings.t5_length))


def _clip_tokenizer(words: Sequence[str], length: int) -> CLIPTokenizer:
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    merges = _learn_merges(words)
    entries = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,  # type: ignore[arg-type]  # annotated as strings, but the backend takes pairs
        model_max_length=length,
        pad_token="<|endoftext|>",
    )


def _learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al., 2016) continued until every word is a single piece."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in spelled):
        pairs = Counter(pair for pieces in spelled for pair in pairwise(pieces))
        pair = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(pair)
        spelled = [_merge(pieces, pair) for pieces in spelled]
    return merges


def _merge(pieces: Sequence[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _t5_tokenizer(longer: Sequence[str], length: int) -> T5Tokenizer:
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -2.0) for piece in longer] + [("▁", -6.0)] + [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


class TextEncoders(nn.Module):
    """CLIP (pooled) and T5 (token states) encoders, trained jointly with the flow."""

    def __init__(self, clip: CLIPTextModel, t5: T5EncoderModel) -> None:
        super().__init__()
        self.clip, self.t5 = clip, t5

    def forward(
        self, clip_ids: Int[Tensor, "b clip"], t5_ids: Int[Tensor, "b t5"]
    ) -> tuple[Float[Tensor, "b pooled"], Float[Tensor, "b t5 tokens"]]:
        """Pooled CLIP state and T5 token states."""
        pooled: Tensor = self.clip(clip_ids).pooler_output
        states: Tensor = self.t5(t5_ids).last_hidden_state
        return pooled, states


def build_encoders(settings: TextSettings, tokenizers: Tokenizers) -> TextEncoders:
    """Untrained encoders for the tokenizers' vocabularies."""
    clip_config = CLIPTextConfig(
        vocab_size=len(tokenizers.clip),
        hidden_size=settings.pooled_dim,
        intermediate_size=2 * settings.pooled_dim,
        projection_dim=settings.pooled_dim,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=settings.clip_length,
        bos_token_id=tokenizers.clip.bos_token_id,
        eos_token_id=tokenizers.clip.eos_token_id,
        pad_token_id=tokenizers.clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(tokenizers.t5),
        d_model=settings.token_dim,
        d_kv=settings.token_dim // 2,
        d_ff=2 * settings.token_dim,
        num_layers=settings.t5_layers,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return TextEncoders(CLIPTextModel(clip_config), T5EncoderModel(t5_config))


@dataclass(frozen=True)
class PromptTable:
    """Token ids of every distinct prompt, so that a batch needs an index and no tokenizer."""

    prompts: tuple[str, ...]
    clip_ids: Int[Tensor, "n clip"]
    t5_ids: Int[Tensor, "n t5"]

    @classmethod
    def of(cls, prompts: Sequence[str], tokenizers: Tokenizers) -> PromptTable:
        """Tokenize the distinct prompts, in sorted order."""
        distinct = tuple(sorted(set(prompts)))
        return cls(distinct, *tokenizers.ids(distinct))

    def index(self, prompts: Sequence[str]) -> Int[Tensor, " b"]:
        """Row of each prompt."""
        row = {prompt: i for i, prompt in enumerate(self.prompts)}
        return torch.tensor([row[prompt] for prompt in prompts])


def build_autoencoder(settings: AutoencoderSettings) -> AutoencoderTiny:
    """An untrained `AutoencoderTiny` with factor 4."""
    channels = (settings.width,) * 3
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(2, 1, 0),
        latent_channels=settings.latent_channels,
        act_fn="relu",
    )


def train_autoencoder(
    world: World, settings: AutoencoderSettings, seed: int, progress: Callable[[int, int], None]
) -> AutoencoderTiny:
    """Train on rendered images and store scale and shift so that scaled latents have mean 0 and std 1.

    The loss is L1 + MSE between the image and the decoding of noised latents, plus a penalty that keeps each latent
    channel at mean 0 and std 1; without it the encoder would outgrow the noise.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.from_numpy(world.images(settings.pool, rng)) * 2 - 1
    model = build_autoencoder(settings).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=1e-3)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * cosine(step, settings.steps, warmup=50)
        index = torch.randint(len(pictures), (settings.batch,), generator=generator)
        images = pictures[index].contiguous(memory_format=torch.channels_last)
        latents = model.encode(images).latents
        noise = torch.randn(latents.shape, generator=generator)
        decoded = model.decode(latents + settings.latent_noise * noise).sample
        spread = latents.std(dim=(0, 2, 3)) - 1
        regulariser = latents.mean(dim=(0, 2, 3)).square().mean() + spread.square().mean()
        loss = F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + settings.regulariser * regulariser
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, settings.steps)
    model.eval()
    with torch.no_grad():
        sample = torch.cat([model.encode(chunk).latents for chunk in torch.split(pictures[:4096], 512)])
    shift, std = sample.mean().item(), sample.std().item()
    model.register_to_config(shift_factor=shift, scaling_factor=1 / std)
    return model


@torch.no_grad()
def encode(model: AutoencoderTiny, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b tokens packed"]:
    """Images in [0, 1] to packed, scaled latents."""
    latents = torch.cat([model.encode(chunk * 2 - 1).latents for chunk in torch.split(images, 512)])
    packed: Tensor = pack((latents - model.config.shift_factor) * model.config.scaling_factor)
    return packed


@torch.no_grad()
def decode(model: AutoencoderTiny, tokens: Float[Tensor, "b tokens packed"]) -> Float[Tensor, "b 3 h w"]:
    """Packed latents to images in [0, 1]."""
    side = PATCH * math.isqrt(tokens.shape[1])
    latents = unpack(tokens, side, side) / model.config.scaling_factor + model.config.shift_factor
    return torch.cat([model.decode(chunk).sample for chunk in torch.split(latents, 512)]).mul(0.5).add(0.5).clamp(0, 1)
