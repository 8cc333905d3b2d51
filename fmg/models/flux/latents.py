"""FLUX's token layout: 2x2 patches of the latent image become tokens, each with its position."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PATCH = 2


def pack(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b tokens channels"]:
    """2x2 patches as tokens, row by row: `tokens = h/2 * w/2`, `channels = 4c`, as `FluxPipeline._pack_latents`."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack(tokens: Float[Tensor, "b tokens channels"], height: int, width: int) -> Float[Tensor, "b c h w"]:
    """The inverse of `pack` for latents of the given height and width."""
    b, _, channels = tokens.shape
    c = channels // (PATCH * PATCH)
    patches = tokens.reshape(b, height // PATCH, width // PATCH, c, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, c, height, width)


def image_ids(height: int, width: int, device: torch.device) -> Float[Tensor, "tokens 3"]:
    """Rotary positions (0, row, column) of the tokens of an `height` x `width` latent, fp32."""
    rows = torch.arange(height // PATCH, dtype=torch.float32, device=device)
    columns = torch.arange(width // PATCH, dtype=torch.float32, device=device)
    grid = torch.cartesian_prod(rows, columns)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)
