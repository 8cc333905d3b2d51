"""FLUX.3 [klein] as a model: its two times, its positions, and the pipeline that reads its adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.modular_pipelines.flux3 import Flux3DistilledModularPipeline
from torch import Tensor

from fmg.models.common.network import LatentNetwork
from fmg.models.common.pipeline_parts import Components
from fmg.models.common.qwen import QwenText
from fmg.models.common.text import TextEncoders
from fmg.models.flux2.model import Flux2Model, Flux2Network
from fmg.models.flux3.loading import FLUX3_FAMILY, load_parts
from fmg.models.flux3.size import UNUSED


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
    """A FLUX.3 [klein] model. Everything about tokens and latents is as in FLUX.2.

    Args:
        components: a loaded folder.
        name: registered name of the model, written into saved adapters.
        text: encoder of prompts; None takes the folder's own, beside the transformer.
    """

    pipeline: ClassVar[Any] = AdapterPipeline
    network_class: ClassVar[type[LatentNetwork]] = Flux3Network
    text_folders: ClassVar[tuple[str, ...]] = FLUX3_FAMILY.text_folders
    second_embedder: ClassVar[str | None] = "target_timestep_embedder"
    unused: ClassVar[tuple[str, ...]] = UNUSED
    load_parts: ClassVar[Callable[..., Components[QwenText]]] = staticmethod(load_parts)

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
