"""Stage 1: a tiny autoencoder with a noise-robust decoder, so that small latent errors do not smear a picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor

from fmg.worlds.pretrain.optim import cosine
from fmg.worlds.pretrain.settings import AutoencoderSettings
from fmg.worlds.pretrain.world import World


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
    """Train on rendered pictures and store scale and shift so that scaled latents have mean 0 and std 1.

    The loss is L1 + MSE between the picture and the decoding of noised latents, plus a penalty that keeps each latent
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
    return pack((latents - model.config.shift_factor) * model.config.scaling_factor)


@torch.no_grad()
def decode(model: AutoencoderTiny, tokens: Float[Tensor, "b tokens packed"]) -> Float[Tensor, "b 3 h w"]:
    """Packed latents to images in [0, 1]."""
    latents = unpack(tokens) / model.config.scaling_factor + model.config.shift_factor
    return torch.cat([model.decode(chunk).sample for chunk in torch.split(latents, 512)]).mul(0.5).add(0.5).clamp(0, 1)


def pack(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b tokens packed"]:
    """2 x 2 patches to tokens, in the channel order of diffusers' `FluxPipeline`."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Float[Tensor, "b tokens packed"]) -> Float[Tensor, "b c h w"]:
    """Inverse of `pack` for square latents."""
    b, n, packed = tokens.shape
    side = int(n**0.5)
    return tokens.reshape(b, side, side, packed // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, 2 * side, 2 * side)
