"""SD3 flow maps as models: the call of the transformer, and how a folder with adapters becomes a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from fmg.core.hub import locate
from fmg.core.model_folder import read_config
from fmg.core.types import Conditioning
from fmg.models.common.model import AdaptedModel
from fmg.models.common.network import LatentNetwork
from fmg.models.common.pipeline_parts import checked_times, load_components
from fmg.models.common.stacked_adapters import load_merged
from fmg.models.common.weights import WeightFiles
from fmg.models.published import located_adapters
from fmg.models.sd3.loading import SD3, SD3Components, SD3Text, check_fit
from fmg.models.sd3.transformer import FlowMapSD3Transformer2DModel

if TYPE_CHECKING:
    from fmg.models.sd3.configs import SD35MeanFlowConfig


class SD3Network(LatentNetwork):
    """A `FlowMapSD3Transformer2DModel`."""

    def _call(self, x: Tensor, t: Tensor, s: Tensor | None, cond: Conditioning) -> Tensor:
        output: Tensor = self._transformer(
            hidden_states=x.to(self._dtype),
            encoder_hidden_states=cond.tensors["tokens"].to(self._dtype),
            pooled_projections=cond.tensors["pooled"],
            timestep=t,
            second=s,
            return_dict=False,
        )[0]
        return output


class SD3Model(AdaptedModel[SD3Text]):
    """An SD3 flow map. Arguments as those of `AdaptedModel`."""

    pipeline: ClassVar[Any] = StableDiffusion3Pipeline
    network_class: ClassVar[type[LatentNetwork]] = SD3Network
    text_folders: ClassVar[tuple[str, ...]] = SD3.text_folders
    second_embedder: ClassVar[str | None] = FlowMapSD3Transformer2DModel.second_embedder

    @classmethod
    def read(
        cls, config: SD35MeanFlowConfig, device: torch.device, dtype: torch.dtype, text_device: torch.device
    ) -> SD3Components:
        """The parts that `config` describes, from files on this computer, with its adapters merged."""
        folder = locate(config.architecture(), "model", config.registered_name).path
        conventions, own = config.conventions(), folder / "transformer"

        def transformer() -> tuple[FlowMapSD3Transformer2DModel, WeightFiles]:
            SD3.class_of(own, own.name)
            stated = read_config(own)
            stated |= checked_times(own, stated, conventions)
            return load_merged(FlowMapSD3Transformer2DModel, stated, own, located_adapters(config), device, dtype)

        parts = load_components(SD3, folder, conventions, transformer, SD3Text, device, dtype, text_device)
        check_fit(parts)
        return parts
