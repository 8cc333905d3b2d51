"""FLUX.3 [klein] as a model: the parts of its folder, its two times, and the pipeline that reads its adapters."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux3Transformer2DModel
from diffusers.modular_pipelines.flux3 import Flux3DistilledModularPipeline
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

from fmg.core.errors import CheckpointError
from fmg.core.hub import locate
from fmg.models.common.network import LatentNetwork
from fmg.models.common.pipeline_parts import Components, Family, load_components
from fmg.models.common.qwen import QwenText
from fmg.models.common.text import TextEncoders
from fmg.models.flux2.model import Flux2Model, Flux2Network, check_parts
from fmg.models.flux3.size import UNUSED
from fmg.models.published import PublishedConfig

FLUX3_FAMILY = Family(
    "FLUX.3 [klein]",
    MappingProxyType(
        {
            "transformer": {"Flux3Transformer2DModel": Flux3Transformer2DModel},
            "vae": {"AutoencoderKLFlux2": AutoencoderKLFlux2},
            "text_encoder": {"Qwen3VLForConditionalGeneration": Qwen3VLForConditionalGeneration},
        }
    ),
    # prompts need only the tokenizer of the processor that the pipeline loads
    MappingProxyType({"tokenizer": Qwen2Tokenizer}),
)

# the states, the template and the positions of Flux3DistilledTextEncoderStep
_text = partial(QwenText, layers=(4, 8, 12, 16, 20, 24, 28, 32), padding_side="right", padding_position=1)


class Flux3Network(Flux2Network):
    """A `Flux3Transformer2DModel` with `flow_map`: the average velocity from t to s, which is its `target_timestep`."""

    spacing: ClassVar[float] = 0.5

    def _times(self, t: Tensor, s: Tensor | None) -> dict[str, Tensor]:
        assert s is not None
        return {"timestep": t.to(self._dtype), "target_timestep": s.to(self._dtype)}


class AdapterPipeline(Flux3DistilledModularPipeline):  # type: ignore[misc]
    """The stock pipeline around a transformer and nothing else: enough to load an adapter."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.update_components(transformer=transformer)


class Flux3Model(Flux2Model):
    """A FLUX.3 [klein] model. Everything about tokens and latents is as in FLUX.2."""

    pipeline: ClassVar[Any] = AdapterPipeline
    network_class: ClassVar[type[LatentNetwork]] = Flux3Network
    text_folders: ClassVar[tuple[str, ...]] = FLUX3_FAMILY.text_folders
    second_embedder: ClassVar[str | None] = "target_timestep_embedder"
    unused: ClassVar[tuple[str, ...]] = UNUSED

    @classmethod
    def read(
        cls, config: PublishedConfig, device: torch.device, dtype: torch.dtype, text_device: torch.device
    ) -> Components[QwenText]:
        folder = locate(config.architecture(), "model", config.registered_name).path
        parts = load_components(FLUX3_FAMILY, folder, config.conventions(), None, _text, device, dtype, text_device)
        if not parts.transformer.config.flow_map:
            raise CheckpointError(
                f"The transformer in {folder} is not a flow map but a base model for 50 steps and classifier-free"
                " guidance",
                "Give a folder of the distilled model, whose transformer has a target_timestep_embedder.",
            )
        check_parts(parts)
        return parts

    def __init__(self, components: Components[QwenText], name: str, *, text: TextEncoders | None = None) -> None:
        super().__init__(components, name, text=text)
        # Trained beside a LoRA the embedder is fp32, but the stock class passes it, and sums, the network's dtype.
        embedder = components.transformer.get_submodule(self.second_embedder)
        embedder.register_forward_pre_hook(_widened)
        embedder.register_forward_hook(partial(_narrowed, components.transformer.dtype))


def _widened(embedder: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to(embedder.linear_1.weight.dtype) for x in inputs)


def _narrowed(dtype: torch.dtype, embedder: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(dtype)
