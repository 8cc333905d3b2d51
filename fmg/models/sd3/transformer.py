"""The SD3 transformer as a flow map: two explicit fp32 times instead of one low-precision timestep."""

from __future__ import annotations

from typing import ClassVar

# diffusers looks for this base class in a component's module to decide how to load it
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from fmg.models.common.two_times import TwoTimeMixin
from fmg.models.sd3.size import SECOND_EMBEDDER


class FlowMapSD3Transformer2DModel(TwoTimeMixin, SD3Transformer2DModel):  # type: ignore[misc]
    """``SD3Transformer2DModel`` whose forward takes the two times ``t`` and ``s`` of a flow map (`TwoTimeMixin`).

    The state dict has the stock names, plus ``time_text_embed.delta_embedder.linear_{1,2}`` of a two-time map. With
    AnyFlow's gate g, the time embedding is
    ``(1 - g) timestep_embedder(c t) + g delta_embedder(c s) + text_embedder(pooled)`` with ``c = time_scale``, as in
    MeanFlowNFT.
    """

    second_embedder: ClassVar[str] = SECOND_EMBEDDER
