"""Stage 2: flow matching on partly wrong captions, text encoders trained jointly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float, Int
from torch import Tensor, nn

from fmg.models.conventions import Takes
from fmg.models.flux.latents import PATCH, image_ids
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from fmg.training.update import Ema
from pretraining.networks import PromptTable, TextEncoders, encode
from pretraining.optim import HybridOptimizer, load_average
from pretraining.settings import FlowSettings, TextSettings, TransformerSettings
from pretraining.world import World

PIXELS_PER_TOKEN = 8
"""Side of the square of pixels that one token covers: the autoencoder's factor 4, then 2 x 2 packing."""


def build_transformer(
    settings: TransformerSettings, text: TextSettings, channels: int, second_time: Takes
) -> FlowMapFluxTransformer2DModel:
    """A small FLUX transformer whose modulation and output layers start at zero, so that every block is an identity.

    `channels` is the width of a packed token.
    """
    model: FlowMapFluxTransformer2DModel = FlowMapFluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        num_layers=settings.num_layers,
        num_single_layers=settings.num_single_layers,
        attention_head_dim=settings.attention_head_dim,
        num_attention_heads=settings.num_attention_heads,
        joint_attention_dim=text.token_dim,
        pooled_projection_dim=text.pooled_dim,
        guidance_embeds=False,
        axes_dims_rope=settings.axes_dims_rope,
        time_scale=settings.time_scale,
        second_time=second_time,
    )
    zeroed = [m.linear for name, m in model.named_modules() if "norm" in name and hasattr(m, "linear")]
    zeroed.append(model.proj_out)
    if second_time != "none":
        zeroed.append(model.timestep_embedder2.linear_2)
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


class ConditionalNet(nn.Module):
    """Transformer and text encoders together: prompt ids in, velocity out."""

    image_ids: Tensor
    text_ids: Tensor

    def __init__(
        self, transformer: FlowMapFluxTransformer2DModel, encoders: TextEncoders, resolution: int, t5_length: int
    ) -> None:
        super().__init__()
        self.transformer, self.encoders = transformer, encoders
        side = PATCH * (resolution // PIXELS_PER_TOKEN)
        self.register_buffer("image_ids", torch.from_numpy(image_ids(side, side)), persistent=False)
        self.register_buffer("text_ids", torch.zeros(t5_length, 3), persistent=False)

    def noise(self, count: int, generator: torch.Generator) -> Float[Tensor, "b tokens channels"]:
        """Standard normal latents."""
        channels: int = self.transformer.config.in_channels
        return torch.randn(count, len(self.image_ids), channels, generator=generator)

    def encode(self, table: PromptTable, index: Int[Tensor, " b"]) -> tuple[Tensor, Tensor]:
        """Pooled and token states of prompts by their row in the table."""
        pooled, states = self.encoders(table.clip_ids[index], table.t5_ids[index])
        return pooled, states

    def forward(
        self,
        x: Float[Tensor, "b tokens channels"],
        t: Float[Tensor, " b"],
        s: Float[Tensor, " b"] | None,
        condition: tuple[Tensor, Tensor],
    ) -> Float[Tensor, "b tokens channels"]:
        """Velocity, or average velocity from `t` to `s`."""
        pooled, states = condition
        output: Tensor = self.transformer(
            x, states, pooled, t, second=s, img_ids=self.image_ids, txt_ids=self.text_ids
        )[0]
        return output


@dataclass(frozen=True)
class LatentPool:
    """Encoded images and the row of their caption in the prompt table."""

    latents: Float[Tensor, "n tokens channels"]
    caption: Int[Tensor, " n"]


def build_pool(
    world: World, settings: FlowSettings, autoencoder: AutoencoderTiny, table: PromptTable, seed: int
) -> LatentPool:
    """Render captioned images and encode them."""
    rng = np.random.default_rng([seed, 2])
    latents: list[Tensor] = []
    captions: list[str] = []
    for start in range(0, settings.pool, 4096):
        count = min(4096, settings.pool - start)
        drawn = world.captioned(count, rng)
        latents.append(encode(autoencoder, torch.from_numpy(drawn.images)))
        captions += drawn.captions
    return LatentPool(torch.cat(latents), table.index(captions))


def train_flow(
    net: ConditionalNet,
    pool: LatentPool,
    table: PromptTable,
    settings: FlowSettings,
    seed: int,
    progress: Callable[[int, int], None],
) -> None:
    """Flow matching on the linear path, `v = noise - data`; `net` ends with its averaged weights.

    Times are logit-normal(0, 1) (Esser et al., 2024), stratified over the batch, mixed with one part in four uniform.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    optimizer = HybridOptimizer([net], settings.lr, settings.muon_lr, settings.schedule_steps, fp32=settings.muon_fp32)
    ema = Ema(list(net.parameters()), settings.ema)
    for step in range(settings.steps):
        index = torch.randint(len(pool.latents), (settings.batch,), generator=generator)
        data = pool.latents[index]
        noise = torch.randn(data.shape, generator=generator)
        t = flow_times(settings.batch, generator)
        x = torch.lerp(data, noise, t[:, None, None])
        predicted = net(x, t, None, net.encode(table, pool.caption[index]))
        optimizer.step((predicted - (noise - data)).square().mean())
        ema.update()
        progress(step + 1, settings.steps)
    load_average(net, ema)


def flow_times(batch: int, generator: torch.Generator) -> Float[Tensor, " b"]:
    """Stratified training times in (0, 1)."""
    u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    u = u[torch.randperm(batch, generator=generator)]
    logit_normal = torch.sigmoid(torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
    uniform = torch.rand(batch, generator=generator) < 0.25
    return torch.where(uniform, u, logit_normal)
