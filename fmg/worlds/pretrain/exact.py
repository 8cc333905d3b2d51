"""The flow of a world with finitely many pictures, in closed form: a teacher that needs no training."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float, Int
from torch import Tensor

from fmg.worlds.pretrain.autoencoder import encode
from fmg.worlds.pretrain.text import PromptTable
from fmg.worlds.pretrain.world import Support


class ExactTeacher:
    """Probability-flow velocity of a finite data set on the linear path `x_t = (1 - t) data + t noise`.

    The velocity `E[noise - data | x_t] = (x_t - m) / t` needs only the posterior mean `m` of the data, a softmax over
    all latents of log-likelihood plus log-prior (Karras et al., 2022, eq. 57). The prior of a caption is the
    probability that a picture was given this caption, so wrong captions make it spread over what they may mean.
    """

    def __init__(self, support: Support, autoencoder: AutoencoderTiny) -> None:
        self._latents = encode(autoencoder, torch.from_numpy(support.images))
        self._log_likelihood = support.log_likelihood

    def noise(self, count: int, generator: torch.Generator) -> Float[Tensor, "b tokens channels"]:
        """Standard normal latents."""
        return torch.randn(count, *self._latents.shape[1:], generator=generator)

    def encode(self, table: PromptTable, index: Int[Tensor, " b"]) -> Float[Tensor, "b n"]:
        """Log-prior of each latent given the captions, up to a constant."""
        captions = [table.prompts[row] for row in index.tolist()]
        return torch.from_numpy(np.asarray(self._log_likelihood(captions), dtype=np.float32))

    def __call__(
        self,
        x: Float[Tensor, "b tokens channels"],
        t: Float[Tensor, " b"],
        s: None,
        condition: Float[Tensor, "b n"],
    ) -> Float[Tensor, "b tokens channels"]:
        """The velocity at times `t` in (0, 1]."""
        data = self._latents.flatten(1)
        points, time = x.flatten(1), t[:, None]
        # |x - (1 - t) data|^2 without the term that all data share
        distance = (1 - time) ** 2 * data.square().sum(1) - 2 * (1 - time) * points @ data.T
        mean = torch.softmax(condition - distance / (2 * time**2), dim=1) @ data
        return ((points - mean) / time).view_as(x)
