"""FLUX.2 [klein] as a model: the parts of its folder, its tokens and positions, its times, its normalised latents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from jaxtyping import Float
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from fmg.core.errors import CheckpointError
from fmg.core.hub import locate
from fmg.core.json_io import JsonError, read_object
from fmg.core.model_folder import read_config
from fmg.core.types import Conditioning
from fmg.models.common.model import AdaptedModel
from fmg.models.common.network import LatentNetwork
from fmg.models.common.pipeline_parts import Components, Family, check_rotary, check_same, load_components
from fmg.models.common.qwen import QwenText
from fmg.models.flux.latents import PATCH, pack, unpack
from fmg.models.published import PublishedConfig

# the defaults of diffusers; an axis for time, row, column and place in the text
_STOCK_AXES: Mapping[str, object] = MappingProxyType({"attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32]})

FLUX2 = Family(
    "FLUX.2 [klein]",
    MappingProxyType(
        {
            "transformer": {"Flux2Transformer2DModel": Flux2Transformer2DModel},
            "vae": {"AutoencoderKLFlux2": AutoencoderKLFlux2},
            "text_encoder": {"Qwen3ForCausalLM": Qwen3ForCausalLM},
        }
    ),
    MappingProxyType({"tokenizer": Qwen2Tokenizer}),
)

# the states and the template of Flux2KleinPipeline
_text = partial(QwenText, layers=(9, 18, 27), thinking=False)


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
    """A FLUX.2 [klein] model. Patching of latents into tokens happens inside."""

    pipeline: ClassVar[Any] = Flux2KleinPipeline
    network_class: ClassVar[type[LatentNetwork]] = Flux2Network
    text_folders: ClassVar[tuple[str, ...]] = FLUX2.text_folders

    @classmethod
    def read(
        cls, config: PublishedConfig, device: torch.device, dtype: torch.dtype, text_device: torch.device
    ) -> Components[QwenText]:
        folder = locate(config.architecture(), "model", config.registered_name).path
        _check_distilled(folder)
        parts = load_components(FLUX2, folder, config.conventions(), None, _text, device, dtype, text_device)
        if parts.transformer.config.guidance_embeds:
            raise CheckpointError(
                f"The transformer in {folder} embeds a guidance scale, as that of FLUX.2 [dev] does",
                "Give a folder of FLUX.2 [klein].",
            )
        check_parts(parts)
        return parts

    @staticmethod
    def vae_latents(vae: Any, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Latents denormalised for the autoencoder: each channel of a patch has a mean and a std."""
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().to(latents.dtype)
        tokens = pack(latents) * std + vae.bn.running_mean.to(latents.dtype)
        unpacked: Tensor = unpack(tokens, *latents.shape[-2:])
        return unpacked


def check_parts(components: Components[QwenText]) -> None:
    """Checks that components of FLUX.2 or FLUX.3, which load one by one, belong together.

    Raises:
        CheckpointError: they do not.
    """
    transformer, text, vae = components.transformer.config, components.text, components.vae.config
    own = components.folder / "transformer"
    check_rotary(own, read_config(own), _STOCK_AXES)
    text.check_layers(components.folder / "text_encoder")
    check_same(
        "text_encoder", "width of its hidden states", text.width, "joint_attention_dim", transformer.joint_attention_dim
    )
    channels = PATCH**2 * vae.latent_channels
    check_same("vae", f"latent_channels x {PATCH**2}", channels, "in_channels", transformer.in_channels)
    if tuple(vae.patch_size) != (PATCH, PATCH):
        raise CheckpointError(
            f"The autoencoder in {components.folder} normalises patches of {tuple(vae.patch_size)} latent pixels",
            f"Give a folder with patches of {PATCH} x {PATCH}, as published.",
        )


def _check_distilled(folder: Path) -> None:
    index = folder / "model_index.json"
    try:
        distilled = read_object(index).get("is_distilled", True)
    except (OSError, JsonError):
        # the file names classes only, which the components state themselves
        return
    if not distilled:
        raise CheckpointError(
            f"{index} states that the model is not distilled: it takes 50 steps and classifier-free guidance",
            "Give FLUX.2 [klein] itself instead of its base model.",
        )
