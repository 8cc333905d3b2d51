"""The FLUX transformer as a flow map: two explicit fp32 times instead of one low-precision timestep."""

from __future__ import annotations

from typing import ClassVar

# diffusers looks for this base class in a component's module to decide how to load it
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from fmg.models.common.two_times import TwoTimeMixin
from fmg.models.flux.size import SECOND_EMBEDDER


class FlowMapFluxTransformer2DModel(TwoTimeMixin, FluxTransformer2DModel):  # type: ignore[misc]
    """``FluxTransformer2DModel`` whose forward takes the two times ``t`` and ``s`` of a flow map (`TwoTimeMixin`).

    The state dict has the stock names, plus ``timestep_embedder2.linear_{1,2}`` when ``second_time`` is not ``"none"``;
    the time embedding is then ``time_text_embed(c t, guidance, pooled) + timestep_embedder2(sinusoid(c (t - s)))``
    (or ``sinusoid(c s)``) with ``c = time_scale``, as in the published MeanFlow students of FLUX (T2I-Distill), unless
    ``second_time`` states a gate (`fmg.models.conventions.SecondTime`).
    """

    second_embedder: ClassVar[str] = SECOND_EMBEDDER
