"""Few-step sampling, from which the figures of a model card are measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor

from fmg.worlds.pretrain.autoencoder import decode
from fmg.worlds.pretrain.flow import ConditionalNet
from fmg.worlds.pretrain.text import PromptTable, Tokenizers


@torch.no_grad()
def sample(
    net: ConditionalNet, condition: tuple[Tensor, Tensor], steps: int, generator: torch.Generator
) -> Float[Tensor, "b tokens channels"]:
    """Deterministic flow-map sampling on the uniform grid, or multistep consistency sampling of a single-time map."""
    count = len(condition[0])
    single_time = net.transformer.config.second_time == "none"
    x = net.noise(count, generator)
    for k in range(steps, 0, -1):
        t, s = torch.full((count,), k / steps), torch.full((count,), (k - 1) / steps)
        if single_time:
            clean = x - k / steps * net(x, t, None, condition)
            x = torch.lerp(clean, torch.randn(x.shape, generator=generator), (k - 1) / steps)
        else:
            x = x - net(x, t, s, condition) / steps
    return x


@torch.no_grad()
def sample_images(
    net: ConditionalNet,
    autoencoder: AutoencoderTiny,
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    steps: int,
    seed: int,
) -> Float[Tensor, "b 3 h w"]:
    """Images in [0, 1] for prompts."""
    table = PromptTable.of(prompts, tokenizers)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for rows in torch.split(table.index(prompts), 500):
        images.append(decode(autoencoder, sample(net, net.encode(table, rows), steps, generator)))
    return torch.cat(images)
