"""Explicit fp32 times, and a second one, for diffusers transformers that take one low-precision time.

Published flow maps keep the weights and names of a stock transformer and differ in how times enter it: at which scale
they reach their sinusoids, whether there is a second-time embedder, and how its embedding joins the first. Times
stay in fp32, because bf16 rounds 0.999 to 1. None of a stock forward is repeated here: the times travel inside the
`pooled_projections` argument, which it hands to `time_text_embed` untouched.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
    TimestepEmbedding,
    get_timestep_embedding,
)
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.models.common.weights import check_loaded
from fmg.models.conventions import SecondTime

SINUSOID_CHANNELS = 256


def sinusoids(times: Float[Tensor, " b"]) -> Float[Tensor, "b 256"]:
    """The input of a diffusers embedder for times that are already scaled."""
    embedded: Tensor = get_timestep_embedding(times, SINUSOID_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
    return embedded


class _PackedTimes:
    """A stock time-and-text embedding that reads `[pooled | t | second embedding]` from one fp32 tensor."""

    timestep_embedder: TimestepEmbedding

    def _setup(self, gate: float | None, *sizes: int) -> None:
        self.gate = gate
        self.sizes = sizes

    def _joined(self, embedding: Tensor, time: Tensor, second: Tensor) -> Tensor:
        second = second.to(embedding.dtype)
        if self.gate is not None:
            # (1 - g) emb(t) + g emb2 in place of emb(t)
            first: Tensor = self.timestep_embedder(sinusoids(time).to(embedding.dtype))
            second = self.gate * (second - first)
        return embedding + second


class PackedTimeTextEmbeddings(_PackedTimes, CombinedTimestepTextProjEmbeddings):  # type: ignore[misc]
    """`[pooled | t | second embedding]`."""

    def __init__(self, embedding_dim: int, pooled_projection_dim: int, gate: float | None) -> None:
        super().__init__(embedding_dim, pooled_projection_dim)
        self._setup(gate, pooled_projection_dim, 1, embedding_dim)

    def forward(self, timestep: Tensor, packed: Float[Tensor, "b packed"]) -> Float[Tensor, "b inner"]:
        """The embedding, in the dtype of the weights; the stock argument `timestep` is ignored."""
        pooled, time, second = torch.split_with_sizes(packed, self.sizes, dim=-1)
        dtype = self.timestep_embedder.linear_1.weight.dtype
        embedding: Tensor = super().forward(time[:, 0], pooled.to(dtype).contiguous())
        return self._joined(embedding, time[:, 0], second)


class PackedTimeGuidanceTextEmbeddings(_PackedTimes, CombinedTimestepGuidanceTextProjEmbeddings):  # type: ignore[misc]
    """As above for guidance-distilled weights: `[pooled | t | second embedding | guidance]`."""

    def __init__(self, embedding_dim: int, pooled_projection_dim: int, gate: float | None) -> None:
        super().__init__(embedding_dim, pooled_projection_dim)
        self._setup(gate, pooled_projection_dim, 1, embedding_dim, 1)

    def forward(self, timestep: Tensor, packed: Float[Tensor, "b packed"]) -> Float[Tensor, "b inner"]:
        """The embedding, in the dtype of the weights; the stock argument `timestep` is ignored."""
        pooled, time, second, guidance = torch.split_with_sizes(packed, self.sizes, dim=-1)
        dtype = self.timestep_embedder.linear_1.weight.dtype
        embedding: Tensor = super().forward(time[:, 0], guidance[:, 0], pooled.to(dtype).contiguous())
        return self._joined(embedding, time[:, 0], second)


class TwoTimeMixin:
    """Mixin that lets a stock transformer with `time_text_embed` take a flow map's times; listed before its class.

    A class has the arguments of its stock class and two keywords, which are stored in its config: `time_scale`, the
    factor on times and guidance before their sinusoids (1000 for stock weights), and `second_time`, how the second time
    enters, as `SecondTime` writes it (``"none"`` has no such embedder). A `UsageError` says when one is not possible.
    """

    second_embedder: ClassVar[str]
    """Path of the second-time embedder in the network, as tensor names in published files have it."""

    config: Any
    inner_dim: int

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if TwoTimeMixin not in cls.__bases__:
            # a subclass of a flow-map transformer, as FSDP2 makes of the module that it shards
            return
        stock: Any = next(base for base in cls.__bases__ if base is not TwoTimeMixin)

        def init(self: Any, *args: Any, time_scale: float, second_time: Any, **sizes: Any) -> None:
            stock.__init__(self, *args, **sizes)
            self._take_times(time_scale, second_time)

        # diffusers reads the keys of a config from the signature
        given = inspect.signature(stock.__init__).parameters.values()
        times = inspect.signature(init, eval_str=True).parameters
        own = [times[name] for name in ("time_scale", "second_time")]
        init.__signature__ = inspect.Signature([*given, *own])  # type: ignore[attr-defined]
        cls.__init__ = register_to_config(init)  # type: ignore[method-assign]

    def _take_times(self, time_scale: float, second_time: object) -> None:
        """Replaces `time_text_embed`, and adds the second-time embedder if the map has one.

        Raises:
            UsageError: `time_scale` is not positive or `second_time` is unknown.
        """
        if not time_scale > 0:
            raise UsageError(f"time_scale is {time_scale}, which is not positive", fix="Use 1.0 or 1000.0.")
        try:
            self.second = SecondTime.model_validate(second_time)
        except ValueError as error:
            raise UsageError(
                f"second_time is {second_time!r}, which is not a known value",
                fix="Use 'none', 'duration' or 'target', or a mapping of takes, gate and scale.",
            ) from error
        cls = PackedTimeGuidanceTextEmbeddings if self._guided else PackedTimeTextEmbeddings
        self.time_text_embed = cls(self.inner_dim, self.config.pooled_projection_dim, self.second.gate)
        if self.second:
            place, _, name = self.second_embedder.rpartition(".")
            parent = self.get_submodule(place)  # type: ignore[attr-defined]
            parent.add_module(name, TimestepEmbedding(in_channels=SINUSOID_CHANNELS, time_embed_dim=self.inner_dim))

    @property
    def _guided(self) -> bool:
        """Whether the weights embed a guidance scale."""
        return bool(self.config.get("guidance_embeds"))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Float[Tensor, "b text joint"],
        pooled_projections: Float[Tensor, "b pooled"],
        timestep: Float[Tensor, " b"],
        second: Float[Tensor, " b"] | None = None,
        guidance: Float[Tensor, " b"] | None = None,
        return_dict: bool = False,
        **others: Any,
    ) -> Any:
        """Predict the (average) velocity at ``x_t``, in the direction of noise.

        Args:
            hidden_states: latents at time ``t``, as the stock class takes them.
            encoder_hidden_states: token states of the text encoders.
            pooled_projections: pooled states of the text encoders.
            timestep: source time ``t`` in [0, 1], noise at 1, kept in fp32 whatever the model's dtype.
            second: target time ``s`` in [0, t] for a two-time map (``s = t`` gives the velocity), else None.
            guidance: guidance scale such as 3.5, for guidance-distilled weights only.
            return_dict: return ``Transformer2DModelOutput`` instead of a one-element tuple.
            others: as in diffusers.

        Returns:
            ``(output,)`` with output of the shape of the latents.

        Raises:
            UsageError: ``second`` or ``guidance`` is missing, or given to weights that have no embedder for it.
        """
        return super().forward(  # type: ignore[misc]
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=self._packed(pooled_projections, timestep, second, guidance),
            timestep=timestep,
            return_dict=return_dict,
            **others,
        )

    def _packed(
        self,
        pooled: Float[Tensor, "b pooled"],
        timestep: Float[Tensor, " b"],
        second: Float[Tensor, " b"] | None,
        guidance: Float[Tensor, " b"] | None,
    ) -> Float[Tensor, "b packed"]:
        """`[pooled | t | second embedding | guidance]` in fp32; errors as `forward`."""
        if (second is None) == bool(self.second):
            wanted = "takes no second time" if second is not None else "needs the target time s as `second`"
            raise UsageError(
                f"The transformer has second_time={self.config.second_time!r} and {wanted}.",
                fix="Pass `second` exactly when second_time is 'duration' or 'target'.",
            )
        if (guidance is None) == self._guided:
            wanted = "needs a guidance scale" if guidance is None else "takes no guidance scale"
            raise UsageError(
                f"The transformer has guidance_embeds={self._guided} and {wanted}.",
                fix="Pass `guidance` exactly when guidance_embeds is true.",
            )
        dtype = torch.promote_types(pooled.dtype, torch.float32)
        time, scale = timestep.to(dtype), self.config.time_scale
        parts = [pooled.to(dtype), (scale * time)[:, None], self._embed_second(time, second, pooled)]
        if guidance is not None:
            parts.append((scale * guidance.to(dtype))[:, None])
        return torch.cat(parts, dim=-1)

    def _embed_second(self, time: Tensor, second: Tensor | None, pooled: Tensor) -> Tensor:
        """Embedding of the second time (b, inner) in the dtype of `time`; zeros for a map without one."""
        if second is None:
            return time.new_zeros(pooled.shape[0], self.inner_dim)
        target = second.to(time.dtype)
        value = time - target if self.second.takes == "duration" else target
        embedder = self.get_submodule(self.second_embedder)  # type: ignore[attr-defined]
        scaled = (self.second.scale or self.config.time_scale) * value
        embedded: Tensor = embedder(sinusoids(scaled).to(embedder.linear_1.weight.dtype))
        return embedded.to(time.dtype)

    @classmethod
    def from_pretrained(cls, folder: Any, **options: Any) -> Any:
        """As in diffusers, except that missing, unexpected or wrongly shaped weights are an error.

        The stock method only warns about unknown weights, and a flow map without its second-time embedder
        generates noise.

        Raises:
            CheckpointError: the weights in `folder` are not those of its config.
        """
        with_info = options.pop("output_loading_info", False)
        model, info = super().from_pretrained(folder, output_loading_info=True, **options)  # type: ignore[misc]
        check_loaded(folder, info)
        return (model, info) if with_info else model


STOCK_SCALE = 1000.0
_POINTS = 101
# Mean step between times 0.01 apart, over the distance of unrelated times. Embedders that were trained on times scaled
# by 1000 are smooth in them (0.09 to 0.16 on the embedded models); others turn at random (0.7).
_SMOOTH, _ROUGH = 0.3, 0.5
# An embedder that was trained on scaled times hardly responds to unscaled ones: 0.07 of its range on the embedded
# models.
_NARROW = 0.2


@torch.no_grad()
def time_scale_doubt(embedder: TimestepEmbedding, time_scale: float) -> str | None:
    """Why the embedder's response does not fit times in [0, 1] multiplied by `time_scale`; None when it does.

    A heuristic: it compares the response over [0, 1] at the stated scale with that at the stock scale of 1000.
    """
    roughness, spread = _response(embedder, time_scale)
    if time_scale >= STOCK_SCALE / 10:
        if roughness > _ROUGH:
            return (
                f"the weights respond to times multiplied by {time_scale:g} without any smoothness ({roughness:.2f}),"
                " as weights trained on unscaled times do; if images are noise, set model.time_scale to 1"
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
    embedded = embedder(sinusoids(time_scale * times).to(weight.dtype)).float()
    spread = (2 * (embedded - embedded.mean(0)).square().sum(1).mean()).sqrt()
    step = embedded.diff(dim=0).norm(dim=1).mean()
    return float(step / spread.clamp_min(torch.finfo(torch.float32).tiny)), float(spread)
