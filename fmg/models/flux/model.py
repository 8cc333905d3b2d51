"""The transformer as a plain function of latents, times and conditioning, as the flow-map adapters take it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CheckpointError, FmgWarning, MissingDependencyError, reason
from fmg.core.hub import locate
from fmg.core.protocols import FlowMap
from fmg.core.types import Conditioning
from fmg.flow import SingleTimeMap, TwoTimeMap, path_by_name
from fmg.models.common.model import AdaptedModel, Network
from fmg.models.common.policy_weights import Scope
from fmg.models.common.text import TextEncoders, cached_encoders
from fmg.models.conventions import FlowMapConventions
from fmg.models.flux.latents import PATCH, image_ids, pack, unpack
from fmg.models.flux.loading import FluxComponents, load_folder, load_parts
from fmg.models.flux.transformer import time_scale_doubt

if TYPE_CHECKING:
    from fmg.models.flux.configs import FluxConfig

ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class FluxNetwork:
    """`u(x, t, s, cond)` or `net(x, t, cond)` on unpacked latents (b, c, h, w).

    Latents enter in the transformer's dtype and leave in fp32; times stay fp32 to the embedding. The transformer is
    called as a module, so that the hooks of DDP, FSDP2 and PEFT fire.

    Args:
        transformer: a `FlowMapFluxTransformer2DModel`, or a wrapper with its call signature.
        dtype: dtype of the latents that the transformer takes.
        guidance: guidance scale for weights that embed one, else None.
        scope: the context that every call of the transformer runs in.
    """

    def __init__(
        self,
        transformer: Callable[..., Any],
        dtype: torch.dtype,
        guidance: float | None,
        scope: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._transformer = transformer
        self._dtype = dtype
        self._guidance = guidance
        self._scope = scope
        self._ids: dict[tuple[int, int, torch.device], Tensor] = {}

    def within(
        self, scope: Callable[[], AbstractContextManager[None]], transformer: Callable[..., Any] | None = None
    ) -> FluxNetwork:
        """The same network with calls in another context, and through `transformer` if given."""
        return FluxNetwork(transformer or self._transformer, self._dtype, self._guidance, scope)

    def two_time(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Average velocity from `t` to `s`; the velocity for `s = t`."""
        return self._call(x, t, s, cond)

    def single_time(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Average velocity from `t` to 0."""
        return self._call(x, t, None, cond)

    def _call(self, x: Tensor, t: Tensor, s: Tensor | None, cond: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        tokens, pooled = cond.tensors["tokens"], cond.tensors["pooled"]
        guidance = None if self._guidance is None else torch.full_like(t, self._guidance, dtype=torch.float32)
        with self._scope():
            output: Tensor = self._transformer(
                hidden_states=pack(x).to(self._dtype),
                encoder_hidden_states=tokens.to(self._dtype),
                pooled_projections=pooled,
                timestep=t.float(),
                second=None if s is None else s.float(),
                guidance=guidance,
                img_ids=self._image_ids(height, width, x.device),
                txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device),
                return_dict=False,
            )[0]
        return unpack(output, height, width).float()

    def _image_ids(self, height: int, width: int, device: torch.device) -> Tensor:
        key = (height, width, device)
        if key not in self._ids:
            self._ids[key] = torch.from_numpy(image_ids(height, width)).to(device)
        return self._ids[key]


class FluxModel(AdaptedModel[FluxComponents]):
    """A FLUX-class model. Packing of latents into tokens happens inside.

    Args:
        components: a loaded folder.
        name: registered name of the model, written into saved adapters.
        text: encoder of prompts; None takes the folder's own, beside the transformer.
    """

    pipeline: ClassVar[Any] = FluxPipeline
    alpha_tensors: ClassVar[bool] = True
    second_time_embedder: ClassVar[str | None] = "timestep_embedder2"

    def __init__(self, components: FluxComponents, name: str, *, text: TextEncoders | None = None) -> None:
        transformer = components.transformer
        self._network = FluxNetwork(transformer, transformer.dtype, components.conventions.guidance)
        super().__init__(components, name, _latent_shape(components), text=text)

    @classmethod
    def from_folder(cls, folder: Path, device: torch.device, dtype: torch.dtype, name: str) -> FluxModel:
        """Loads a diffusers folder with its `fmg_flow_map.json`.

        Raises:
            CheckpointError: a file of the folder is missing, damaged or of the wrong kind.
        """
        return cls(load_folder(folder, device, dtype), name)

    @classmethod
    def from_config(cls, config: FluxConfig, device: torch.device, dtype: torch.dtype) -> FluxModel:
        """The model that `config` describes, from files on this computer; errors as `PublishedConfig.load`.

        Warns when the weights do not fit the stated time scale.
        """
        name = config.recipe or ""
        asset = next((asset for asset in config.assets() if asset.what == "student"), None)
        student = None if asset is None else locate(asset, "model", name).path
        components = load_parts(
            locate(config.architecture(), "model", name).path,
            config.conventions(),
            device,
            dtype,
            student=student,
            text_device=device if config.text_device == "model" else torch.device("cpu"),
        )
        transformer = components.transformer
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        _set_attention(transformer, config.attention)
        _set_decoding(components.vae, config)
        doubt = time_scale_doubt(transformer.time_text_embed.timestep_embedder, config.time_scale)
        if doubt is not None:
            warnings.warn(f"'{name}': {doubt}", FmgWarning, stacklevel=2)
        text = cached_encoders(
            components.text,
            components.folder,
            ENCODER_FOLDERS,
            config.max_sequence_length,
            device,
            place=config.text_device,
            cache=config.text_cache,
        )
        return cls(components, name, text=text)

    def _map(self, scope: Scope, network: Network | None = None) -> FlowMap:
        return flux_map(self._network.within(scope, network), self.components.conventions)

    def _with_transformer(self, transformer: Any) -> FluxModel:
        return FluxModel(replace(self.components, transformer=transformer), self._name)


def flux_map(network: FluxNetwork, conventions: FlowMapConventions) -> FlowMap:
    """The flow map of a network with these conventions."""
    path = path_by_name(conventions.path)
    if conventions.map == "two-time":
        return TwoTimeMap(network.two_time, path)
    return SingleTimeMap(network.single_time, path)


def _latent_shape(components: FluxComponents) -> tuple[int, int, int]:
    # the rule by which FluxPipeline finds the latent size
    scale = 2 ** (len(components.vae.config.block_out_channels) - 1)
    resolution = components.conventions.resolution
    if resolution % (scale * PATCH):
        raise CheckpointError(
            f"The resolution {resolution} is not a multiple of {scale * PATCH}, the side of a token in pixels",
            f"Use a multiple of {scale * PATCH}.",
        )
    return components.vae.config.latent_channels, resolution // scale, resolution // scale


def _set_decoding(vae: Any, config: FluxConfig) -> None:
    if config.vae_slicing:
        vae.enable_slicing()
    if config.vae_tile is not None:
        vae.enable_tiling()
        # the class takes the size of its tiles from its training images, which are as large as those that it decodes
        vae.tile_sample_min_size = config.vae_tile
        vae.tile_latent_min_size = config.vae_tile // 2 ** (len(vae.config.block_out_channels) - 1)


def _set_attention(transformer: Any, backend: str) -> None:
    if backend == "native":
        return
    try:
        transformer.set_attention_backend(backend)
    except (RuntimeError, ImportError, ValueError) as error:
        raise MissingDependencyError(
            f"The attention backend '{backend}' cannot be used: {reason(error)}",
            "Install what it needs, or set model.attention to native.",
        ) from error
