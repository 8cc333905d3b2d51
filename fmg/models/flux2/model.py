"""FLUX.2 [klein] as a model: its tokens and positions, its times, and its normalised latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import Flux2KleinPipeline
from jaxtyping import Float
from torch import Tensor

from fmg.core.hub import locate
from fmg.core.types import Conditioning
from fmg.models.common.model import AdaptedModel
from fmg.models.common.network import LatentNetwork
from fmg.models.common.qwen import QwenText
from fmg.models.flux.latents import PATCH, pack, unpack
from fmg.models.flux2.loading import FLUX2, Flux2Components, load_parts
from fmg.models.published import PublishedConfig


class Flux2Network(LatentNetwork):
    """A `Flux2Transformer2DModel` on unpacked latents.

    The stock class rounds times to the dtype of the network, after `Flux2KleinPipeline` has rounded them. In bf16 this
    moves the times of the grid by up to 0.4 %, and everybody samples the model at these times. They are rounded in the
    same way here, so that a model is trained at the times at which it is used (ADR 27).
    """

    spacing: ClassVar[float] = 1.0
    """Distance between the positions of neighbouring image tokens."""

    def _call(self, x: Tensor, t: Tensor, s: Tensor | None, cond: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        tokens = cond.tensors["tokens"].to(self._dtype)
        length = tokens.shape[1]
        output: Tensor = self._transformer(
            hidden_states=pack(x).to(self._dtype),
            encoder_hidden_states=tokens,
            img_ids=self._placed(("image", height, width), x.device, lambda: self._image_ids(height, width)),
            txt_ids=self._placed(("text", length), x.device, lambda: _text_ids(length)),
            return_dict=False,
            **self._times(t, s),
        )[0]
        return unpack(output, height, width)

    def _times(self, t: Tensor, s: Tensor | None) -> dict[str, Tensor]:
        """The time arguments of the transformer, as the pipeline rounds them."""
        return {"timestep": (1000 * t).to(self._dtype) / 1000}

    def _image_ids(self, height: int, width: int) -> Float[Tensor, "tokens 4"]:
        """Positions (0, row, column, 0) of the tokens of a `height` x `width` latent."""
        rows, columns = (self.spacing * torch.arange(side // PATCH) for side in (height, width))
        return torch.cartesian_prod(torch.zeros(1), rows, columns, torch.zeros(1))


def _text_ids(length: int) -> Float[Tensor, "length 4"]:
    """Positions (0, 0, 0, place) of the tokens of a prompt."""
    zero = torch.zeros(1)
    return torch.cartesian_prod(zero, zero, zero, torch.arange(float(length)))


class Flux2Model(AdaptedModel[QwenText]):
    """A FLUX.2 [klein] model. Patching of latents into tokens happens inside.

    Args:
        components: a loaded folder.
        name: registered name of the model, written into saved adapters.
        text: encoder of prompts; None takes the folder's own, beside the transformer.
    """

    pipeline: ClassVar[Any] = Flux2KleinPipeline
    network_class: ClassVar[type[LatentNetwork]] = Flux2Network
    text_folders: ClassVar[tuple[str, ...]] = FLUX2.text_folders
    load_parts: ClassVar[Callable[..., Flux2Components]] = staticmethod(load_parts)

    @classmethod
    def read(
        cls, config: PublishedConfig, device: torch.device, dtype: torch.dtype, text_device: torch.device
    ) -> Flux2Components:
        """The parts that `config` describes, from files on this computer."""
        folder = locate(config.architecture(), "model", config.registered_name).path
        return cls.load_parts(folder, config.conventions(), device, dtype, text_device)

    @staticmethod
    def text_facts(components: Flux2Components) -> tuple[str, ...]:
        """The hidden states of Qwen that are used."""
        return components.text.facts

    @staticmethod
    def vae_latents(vae: Any, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Latents denormalised for the autoencoder: each channel of a patch has a mean and a std."""
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().to(latents.dtype)
        tokens = pack(latents) * std + vae.bn.running_mean.to(latents.dtype)
        unpacked: Tensor = unpack(tokens, *latents.shape[-2:])
        return unpacked
