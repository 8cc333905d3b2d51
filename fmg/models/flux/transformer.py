"""The FLUX transformer as a flow map: two explicit fp32 times instead of one low-precision timestep.

Published FLUX flow maps (MeanFlow and sCM students) keep the weights and names of diffusers' ``FluxTransformer2DModel``
and differ in three facts: the scale at which times enter the sinusoids, an optional second-time embedder, and the
need for times in fp32 (bf16 rounds 0.999 to 1). None of the stock forward is repeated here: the times travel inside the
``pooled_projections`` argument, which the stock forward hands to ``time_text_embed`` untouched.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
    TimestepEmbedding,
    get_timestep_embedding,
)

# diffusers looks for this base class in a component's module to decide how to load it
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CheckpointError, UsageError

SecondTime = Literal["none", "duration", "target"]
"""What the second-time embedder receives: nothing, the duration ``t - s``, or the target time ``s``."""

SINUSOID_CHANNELS = 256


class PackedTimestepTextProjEmbeddings(CombinedTimestepTextProjEmbeddings):  # type: ignore[misc]
    """Stock time-and-text embedding that reads ``[pooled | t | second embedding]`` from one fp32 tensor."""

    def __init__(self, embedding_dim: int, pooled_projection_dim: int) -> None:
        super().__init__(embedding_dim, pooled_projection_dim)
        self.sizes = (pooled_projection_dim, 1, embedding_dim)

    def forward(self, timestep: Tensor, packed: Float[Tensor, "b packed"]) -> Float[Tensor, "b inner"]:
        """The embedding, in the dtype of the weights; the stock argument `timestep` is ignored."""
        pooled, time, second = torch.split_with_sizes(packed, self.sizes, dim=-1)
        dtype = self.timestep_embedder.linear_1.weight.dtype
        embedding: Tensor = super().forward(time[:, 0], pooled.to(dtype).contiguous())
        return embedding + second.to(embedding.dtype)


class PackedTimestepGuidanceTextProjEmbeddings(CombinedTimestepGuidanceTextProjEmbeddings):  # type: ignore[misc]
    """As above for guidance-distilled weights: ``[pooled | t | second embedding | guidance]``."""

    def __init__(self, embedding_dim: int, pooled_projection_dim: int) -> None:
        super().__init__(embedding_dim, pooled_projection_dim)
        self.sizes = (pooled_projection_dim, 1, embedding_dim, 1)

    def forward(self, timestep: Tensor, packed: Float[Tensor, "b packed"]) -> Float[Tensor, "b inner"]:
        """The embedding, in the dtype of the weights; the stock argument `timestep` is ignored."""
        pooled, time, second, guidance = torch.split_with_sizes(packed, self.sizes, dim=-1)
        dtype = self.timestep_embedder.linear_1.weight.dtype
        embedding: Tensor = super().forward(time[:, 0], guidance[:, 0], pooled.to(dtype).contiguous())
        return embedding + second.to(embedding.dtype)


class FlowMapFluxTransformer2DModel(FluxTransformer2DModel):  # type: ignore[misc]
    """``FluxTransformer2DModel`` whose forward takes the two times ``t`` and ``s`` of a flow map.

    The state dict has the stock names, plus ``timestep_embedder2.linear_{1,2}`` when ``second_time`` is not ``"none"``;
    the time embedding is then ``time_text_embed(c t, guidance, pooled) + timestep_embedder2(sinusoid(c (t - s)))``
    (or ``sinusoid(c s)``) with ``c = time_scale``, as in the published MeanFlow students of FLUX (T2I-Distill).

    Args:
        time_scale: factor on ``t``, the second time and the guidance before their sinusoids: 1000 for stock FLUX
            weights, 1 for weights trained on unscaled times.
        second_time: what ``timestep_embedder2`` receives. ``"none"`` is a single-time map and has no such embedder.

    All other arguments are those of diffusers' class.

    Raises:
        UsageError: ``time_scale`` is not positive or ``second_time`` is unknown.
    """

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
        second_time: SecondTime,
    ) -> None:
        if not time_scale > 0:
            raise UsageError(f"time_scale is {time_scale}, which is not positive", fix="Use 1.0 or 1000.0.")
        if second_time not in ("none", "duration", "target"):
            raise UsageError(
                f"second_time is {second_time!r}, which is not a known value", fix="Use 'none', 'duration' or 'target'."
            )
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
        embeddings = PackedTimestepGuidanceTextProjEmbeddings if guidance_embeds else PackedTimestepTextProjEmbeddings
        self.time_text_embed = embeddings(self.inner_dim, pooled_projection_dim)
        if second_time != "none":
            self.timestep_embedder2 = TimestepEmbedding(in_channels=SINUSOID_CHANNELS, time_embed_dim=self.inner_dim)

    @classmethod
    def from_pretrained(cls, folder: Any, **options: Any) -> Any:
        """As in diffusers, except that missing, unexpected or wrongly shaped weights are an error.

        The stock method only warns about weights that it does not know, and a flow map without its second-time
        embedder generates noise.

        Raises:
            CheckpointError: the weights in `folder` are not those of its config.
        """
        with_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(folder, output_loading_info=True, **options)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(str(name) for name in info[problem]):
                raise CheckpointError(
                    f"The weights in {folder} have {problem.replace('_', ' ')}: {', '.join(names[:5])}",
                    "Restore the folder from where the model came from.",
                )
        return (model, info) if with_info else model

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
        self._check_arguments(second, guidance)
        dtype = torch.promote_types(pooled_projections.dtype, torch.float32)
        time = timestep.to(dtype)
        parts = [
            pooled_projections.to(dtype),
            (self.config.time_scale * time)[:, None],
            self._embed_second(time, second, pooled_projections),
        ]
        if guidance is not None:
            parts.append((self.config.time_scale * guidance.to(dtype))[:, None])
        return super().forward(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=torch.cat(parts, dim=-1),
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=None,
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=return_dict,
        )

    def _embed_second(self, time: Tensor, second: Tensor | None, pooled: Tensor) -> Tensor:
        """Embedding of the second time (b, inner) in the dtype of ``time``; zeros for a single-time map."""
        if second is None:
            return time.new_zeros(pooled.shape[0], self.inner_dim)
        target = second.to(time.dtype)
        value = time - target if self.config.second_time == "duration" else target
        sinusoid = get_timestep_embedding(
            self.config.time_scale * value, SINUSOID_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        embedded: Tensor = self.timestep_embedder2(sinusoid.to(self.timestep_embedder2.linear_1.weight.dtype))
        return embedded.to(time.dtype)

    def _check_arguments(self, second: Tensor | None, guidance: Tensor | None) -> None:
        if (second is None) != (self.config.second_time == "none"):
            wanted = "takes no second time" if second is not None else "needs the target time s as `second`"
            raise UsageError(
                f"The transformer has second_time={self.config.second_time!r} and {wanted}.",
                fix="Pass `second` exactly when second_time is 'duration' or 'target'.",
            )
        if (guidance is None) == self.config.guidance_embeds:
            wanted = "needs a guidance scale" if guidance is None else "takes no guidance scale"
            raise UsageError(
                f"The transformer has guidance_embeds={self.config.guidance_embeds} and {wanted}.",
                fix="Pass `guidance` exactly when guidance_embeds is true.",
            )


STOCK_SCALE = 1000.0
_POINTS = 101
# Mean step between times 0.01 apart, over the distance of unrelated times. Embedders that were trained on times scaled
# by 1000 are smooth in them (0.09 to 0.16 on the embedded models); others turn at random (0.7).
_SMOOTH, _ROUGH = 0.3, 0.5
# At unscaled times an embedder of scaled ones hardly moves: 0.07 of its range on the embedded models.
_NARROW = 0.2


@torch.no_grad()
def time_scale_doubt(embedder: TimestepEmbedding, time_scale: float) -> str | None:
    """Why the embedder's response does not fit times in [0, 1] multiplied by `time_scale`; None when it does.

    A heuristic: it compares the response over [0, 1] at the stated scale with that at FLUX's own scale of 1000.
    """
    roughness, spread = _response(embedder, time_scale)
    if time_scale >= STOCK_SCALE / 10:
        if roughness > _ROUGH:
            return (
                f"the weights respond to times multiplied by {time_scale:g} without any smoothness ({roughness:.2f}),"
                " as weights of unscaled times do; if images are noise, set model.time_scale to 1"
            )
        return None
    stock_roughness, stock_spread = _response(embedder, STOCK_SCALE)
    if stock_roughness < _SMOOTH and spread < _NARROW * stock_spread:
        return (
            f"the weights hardly respond to times multiplied by {time_scale:g}, and smoothly to times multiplied by"
            f" {STOCK_SCALE:g}, as stock FLUX weights do; if images are noise, set model.time_scale to"
            f" {STOCK_SCALE:g}"
        )
    return None


def _response(embedder: TimestepEmbedding, time_scale: float) -> tuple[float, float]:
    """Roughness over [0, 1], and the root mean square distance of two embeddings."""
    weight = embedder.linear_1.weight
    times = torch.linspace(0, 1, _POINTS, device=weight.device)
    sinusoids = get_timestep_embedding(
        time_scale * times, SINUSOID_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    embedded = embedder(sinusoids.to(weight.dtype)).float()
    spread = (2 * (embedded - embedded.mean(0)).square().sum(1).mean()).sqrt()
    step = embedded.diff(dim=0).norm(dim=1).mean()
    return float(step / spread.clamp_min(torch.finfo(torch.float32).tiny)), float(spread)
