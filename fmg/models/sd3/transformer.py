"""The SD3 transformer as a flow map: two explicit fp32 times instead of one low-precision timestep."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.configuration_utils import register_to_config

# diffusers looks for this base class in a component's module to decide how to load it
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from jaxtyping import Float
from torch import Tensor

from fmg.models.common.two_times import TwoTimeMixin
from fmg.models.sd3.size import SECOND_EMBEDDER


class FlowMapSD3Transformer2DModel(TwoTimeMixin, SD3Transformer2DModel):  # type: ignore[misc]
    """``SD3Transformer2DModel`` whose forward takes the two times ``t`` and ``s`` of a flow map.

    The state dict has the stock names, plus ``time_text_embed.delta_embedder.linear_{1,2}`` of a two-time map. With
    AnyFlow's gate g, the time embedding is
    ``(1 - g) timestep_embedder(c t) + g delta_embedder(c s) + text_embedder(pooled)``, as in MeanFlowNFT.

    Args:
        time_scale: factor c on the times before their sinusoids, 1000 for SD3 weights.
        second_time: how the second time enters, as `SecondTime` writes it. ``"none"`` has no such embedder.

    All other arguments are those of diffusers' class.

    Raises:
        UsageError: ``time_scale`` is not positive or ``second_time`` is unknown.
    """

    second_embedder: ClassVar[str] = SECOND_EMBEDDER

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        *,
        time_scale: float,
        second_time: str | dict[str, object],
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim,
            out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        )
        self._take_times(time_scale, second_time)

    def forward(
        self,
        hidden_states: Float[Tensor, "b c h w"],
        encoder_hidden_states: Float[Tensor, "b text joint"],
        pooled_projections: Float[Tensor, "b pooled"],
        timestep: Float[Tensor, " b"],
        second: Float[Tensor, " b"] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
    ) -> Any:
        """Predict the (average) velocity at ``x_t``, in the direction of noise.

        Args:
            hidden_states: latents at time ``t``.
            encoder_hidden_states: token states of CLIP and T5.
            pooled_projections: pooled states of both CLIPs.
            timestep: source time ``t`` in [0, 1], noise at 1, kept in fp32 whatever the model's dtype.
            second: target time ``s`` in [0, t] for a two-time map (``s = t`` gives the velocity), else None.
            joint_attention_kwargs: as in diffusers.
            return_dict: return ``Transformer2DModelOutput`` instead of a one-element tuple.

        Returns:
            ``(output,)`` with output of shape (b, c, h, w).

        Raises:
            UsageError: ``second`` is missing, or given to weights that have no embedder for it.
        """
        return super().forward(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=self._packed(pooled_projections, timestep, second),
            timestep=timestep,
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=return_dict,
        )
