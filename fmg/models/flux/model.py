"""FLUX-class models: packing of latents into tokens, and how a folder becomes a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor

from fmg.core.errors import FmgWarning
from fmg.core.hub import locate
from fmg.core.types import Conditioning
from fmg.models.common.model import AdaptedModel
from fmg.models.common.network import LatentNetwork
from fmg.models.common.two_times import time_scale_doubt
from fmg.models.flux.latents import image_ids, pack, unpack
from fmg.models.flux.loading import FLUX, FluxComponents, FluxText, load_folder, load_parts
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from fmg.models.published import located_adapters

if TYPE_CHECKING:
    from fmg.models.flux.configs import FluxConfig


class FluxNetwork(LatentNetwork):
    """A `FlowMapFluxTransformer2DModel` on unpacked latents."""

    def _call(self, x: Tensor, t: Tensor, s: Tensor | None, cond: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        tokens, pooled = cond.tensors["tokens"], cond.tensors["pooled"]
        output: Tensor = self._transformer(
            hidden_states=pack(x).to(self._dtype),
            encoder_hidden_states=tokens.to(self._dtype),
            pooled_projections=pooled,
            timestep=t,
            second=s,
            guidance=self._guidances(t),
            img_ids=self._placed(
                ("image", height, width), x.device, lambda: torch.from_numpy(image_ids(height, width))
            ),
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device),
            return_dict=False,
        )[0]
        return unpack(output, height, width)


class FluxModel(AdaptedModel[FluxText]):
    """A FLUX-class model. Packing of latents into tokens happens inside."""

    pipeline: ClassVar[Any] = FluxPipeline
    network_class: ClassVar[type[LatentNetwork]] = FluxNetwork
    text_folders: ClassVar[tuple[str, ...]] = FLUX.text_folders
    alpha_tensors: ClassVar[bool] = True
    second_embedder: ClassVar[str | None] = FlowMapFluxTransformer2DModel.second_embedder

    @classmethod
    def from_folder(cls, folder: Path, device: torch.device, dtype: torch.dtype, name: str) -> FluxModel:
        """Loads a diffusers folder with its `fmg_flow_map.json`.

        Raises:
            CheckpointError: a file of the folder is missing, damaged or of the wrong kind.
        """
        return cls(load_folder(folder, device, dtype), name)

    @classmethod
    def read(
        cls, config: FluxConfig, device: torch.device, dtype: torch.dtype, text_device: torch.device
    ) -> FluxComponents:
        """The parts that `config` describes; warns when the weights do not fit the stated time scale."""
        name = config.registered_name
        asset = next((asset for asset in config.assets() if asset.what == "student"), None)
        components = load_parts(
            locate(config.architecture(), "model", name).path,
            config.conventions(),
            device,
            dtype,
            student=None if asset is None else locate(asset, "model", name).path,
            adapters=located_adapters(config),
            text_device=text_device,
        )
        doubt = time_scale_doubt(components.transformer.time_text_embed.timestep_embedder, config.time_scale)
        if doubt is not None:
            warnings.warn(f"'{name}': {doubt}", FmgWarning, stacklevel=2)
        return components
