"""The FLUX transformer as a flow map: two explicit fp32 times instead of one low-precision timestep."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.configuration_utils import register_to_config

# diffusers looks for this base class in a component's module to decide how to load it
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.models.common.two_times import TwoTimeMixin
from fmg.models.flux.size import SECOND_EMBEDDER


class FlowMapFluxTransformer2DModel(TwoTimeMixin, FluxTransformer2DModel):  # type: ignore[misc]
    """``FluxTransformer2DModel`` whose forward takes the two times ``t`` and ``s`` of a flow map.

    The state dict has the stock names, plus ``timestep_embedder2.linear_{1,2}`` when ``second_time`` is not ``"none"``;
    the time embedding is then ``time_text_embed(c t, guidance, pooled) + timestep_embedder2(sinusoid(c (t - s)))``
    (or ``sinusoid(c s)``) with ``c = time_scale``, as in the published MeanFlow students of FLUX (T2I-Distill), unless
    ``second_time`` states a gate (`fmg.models.conventions.SecondTime`).

    Args:
        time_scale: factor on ``t``, the second time and the guidance before their sinusoids: 1000 for stock FLUX
            weights, 1 for weights trained on unscaled times.
        second_time: how the second time enters, as `SecondTime` writes it. ``"none"`` has no such embedder.

    All other arguments are those of diffusers' class.

    Raises:
        UsageError: ``time_scale`` is not positive or ``second_time`` is unknown.
    """

    second_embedder: ClassVar[str] = SECOND_EMBEDDER

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        *,
        time_scale: float,
        second_time: str | dict[str, object],
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        self._take_times(time_scale, second_time, guidance=guidance_embeds)

    def forward(
        self,
        hidden_states: Float[Tensor, "b tokens channels"],
        encoder_hidden_states: Float[Tensor, "b text joint"],
        pooled_projections: Float[Tensor, "b pooled"],
        timestep: Float[Tensor, " b"],
        second: Float[Tensor, " b"] | None = None,
        guidance: Float[Tensor, " b"] | None = None,
        img_ids: Float[Tensor, "tokens 3"] | None = None,
        txt_ids: Float[Tensor, "text 3"] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
    ) -> Any:
        """Predict the (average) velocity at ``x_t``, in the direction of noise.

        Args:
            hidden_states: packed latents at time ``t``.
            encoder_hidden_states: T5 token states.
            pooled_projections: pooled CLIP state.
            timestep: source time ``t`` in [0, 1], noise at 1, kept in fp32 whatever the model's dtype.
            second: target time ``s`` in [0, t] for a two-time map (``s = t`` gives the velocity), else None.
            guidance: guidance scale such as 3.5, for guidance-distilled weights only.
            img_ids, txt_ids: rotary positions.
            joint_attention_kwargs: as in diffusers.
            return_dict: return ``Transformer2DModelOutput`` instead of a one-element tuple.

        Returns:
            ``(output,)`` with output of shape (b, tokens, channels).

        Raises:
            UsageError: ``second`` or ``guidance`` is missing, or given to weights that have no embedder for it.
        """
        if (guidance is None) == self.config.guidance_embeds:
            wanted = "needs a guidance scale" if guidance is None else "takes no guidance scale"
            raise UsageError(
                f"The transformer has guidance_embeds={self.config.guidance_embeds} and {wanted}.",
                fix="Pass `guidance` exactly when guidance_embeds is true.",
            )
        return super().forward(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=self._packed(pooled_projections, timestep, second, guidance),
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=None,
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=return_dict,
        )
