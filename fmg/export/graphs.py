"""The modules that are traced: thin wrappers with flat tensor signatures around the components of a FLUX-class folder.

Inputs and outputs are fp32 or int64 (`fmg.inference.artifact.manifest`); the casts to the precision inside are part of
the graph. A function builds each module, so that the tracer can build it without memory (`fmg.export.onnx`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fmg.inference.artifact import io_spec
from fmg.inference.artifact.manifest import (
    BATCH,
    HEIGHT,
    IMAGE,
    PIXEL_HEIGHT,
    PIXEL_WIDTH,
    TEXT,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TRANSFORMER,
    VAE_DECODER,
    WIDTH,
    TensorSpec,
)
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
"""Dtype in which a transformer is traced, by the precision of the export."""


@dataclass(frozen=True)
class GraphPlan:
    """One graph to trace.

    Attributes:
        name: name of the graph, one of `fmg.inference.artifact.manifest.GRAPHS`.
        build: creates the module in the current default dtype, with any values.
        dtype: dtype of its weights.
        inputs, outputs: their names, dtypes and shapes.
        strict: whether every tensor of the wrapped module's state dict must become an initialiser.
    """

    name: str
    build: Callable[[], GraphModule]
    dtype: torch.dtype
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    strict: bool = True


class GraphModule(nn.Module):
    """A component with a flat signature. Initialisers get the names of the tensors inside `inner`."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values by the names of the inputs of the graph as keyword arguments of `forward`."""
        return dict(values)


class TransformerGraph(GraphModule):
    """The flow-map transformer with both times explicit and rotary positions from float ids."""

    def forward(
        self,
        hidden_states: Float[Tensor, "b image c"],
        encoder_hidden_states: Float[Tensor, "b text d"],
        pooled_projections: Float[Tensor, "b p"],
        timestep: Float[Tensor, " b"],
        second: Float[Tensor, " b"] | None = None,
        guidance: Float[Tensor, " b"] | None = None,
        *,
        img_ids: Float[Tensor, "image 3"],
        txt_ids: Float[Tensor, "text 3"],
    ) -> Float[Tensor, "b image c"]:
        """The (average) velocity at `timestep` towards `second`, fp32."""
        dtype = self.inner.x_embedder.weight.dtype
        output: Tensor = self.inner(
            hidden_states=hidden_states.to(dtype),
            encoder_hidden_states=encoder_hidden_states.to(dtype),
            pooled_projections=pooled_projections,
            timestep=timestep,
            second=second,
            guidance=guidance,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]
        return output.float()


class ClipGraph(GraphModule):
    """CLIP's text model up to the state of the end-of-text token."""

    def forward(self, input_ids: Int[Tensor, "b l"]) -> Float[Tensor, "b p"]:
        """The pooled state, fp32."""
        # the module's own positions are a buffer, which has no value when traced without memory
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        pooled: Tensor = self.inner(input_ids=input_ids, position_ids=positions).pooler_output
        return pooled.float()


class T5Graph(GraphModule):
    """T5's encoder, without a mask for its padding, as in FLUX."""

    def forward(self, input_ids: Int[Tensor, "b text"]) -> Float[Tensor, "b text d"]:
        """The token states, fp32."""
        states: Tensor = self.inner(input_ids=input_ids)[0]
        return states.float()


class DecoderGraph(GraphModule):
    """The autoencoder's decoder with the scaling of latents and the range of images, as `FluxModel.decode`."""

    def forward(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Images in [0, 1]."""
        config = self.inner.config
        scaled = latents / config.scaling_factor + config.shift_factor
        images: Tensor = self.inner.decode(scaled, return_dict=False)[0]
        return ((images.float() + 1) / 2).clamp(0, 1)


class SingleRotaryEmbedding(FluxPosEmbed):  # type: ignore[misc]
    """FLUX's rotary positions in fp32 rather than fp64, which engines would narrow in their own way."""

    def forward(self, ids: Float[Tensor, "tokens axes"]) -> tuple[Tensor, Tensor]:
        """Cosines and sines (tokens, head), fp32."""
        pairs = [
            get_1d_rotary_pos_embed(
                size,
                ids[:, axis],
                theta=self.theta,
                repeat_interleave_real=True,
                use_real=True,
                freqs_dtype=torch.float32,
            )
            for axis, size in enumerate(self.axes_dim)
        ]
        return torch.cat([cos for cos, _ in pairs], dim=-1), torch.cat([sin for _, sin in pairs], dim=-1)


def transformer_plan(config: Mapping[str, Any], dtype: torch.dtype) -> GraphPlan:
    """The transformer of a diffusers config that states `time_scale` and `second_time`."""
    channels, width = int(config["in_channels"]), int(config["joint_attention_dim"])
    inputs = [
        float_spec(io_spec.HIDDEN_STATES, BATCH, IMAGE, channels),
        float_spec(io_spec.ENCODER_HIDDEN_STATES, BATCH, TEXT, width),
        float_spec(io_spec.POOLED_PROJECTIONS, BATCH, int(config["pooled_projection_dim"])),
        float_spec(io_spec.TIMESTEP, BATCH),
    ]
    inputs += [float_spec(io_spec.SECOND, BATCH)] if config["second_time"] != "none" else []
    inputs += [float_spec(io_spec.GUIDANCE, BATCH)] if config.get("guidance_embeds") else []
    inputs += [float_spec(io_spec.IMG_IDS, IMAGE, 3), float_spec(io_spec.TXT_IDS, TEXT, 3)]
    out = int(config.get("out_channels") or channels)

    def build() -> GraphModule:
        transformer = FlowMapFluxTransformer2DModel.from_config(
            {**config, "_class_name": FlowMapFluxTransformer2DModel.__name__}
        )
        axes = list(transformer.config.axes_dims_rope)
        transformer.pos_embed = SingleRotaryEmbedding(theta=transformer.pos_embed.theta, axes_dim=axes)
        return TransformerGraph(transformer)

    return GraphPlan(TRANSFORMER, build, dtype, tuple(inputs), (float_spec(io_spec.VELOCITY, BATCH, IMAGE, out),))


def clip_plan(config: Mapping[str, Any], length: int, dtype: torch.dtype) -> GraphPlan:
    """CLIP's text encoder of a transformers config, for prompts of exactly `length` tokens."""
    parsed = CLIPTextConfig.from_dict({**config, "attn_implementation": "eager"})
    return GraphPlan(
        TEXT_ENCODER,
        lambda: ClipGraph(_with_eager_attention(CLIPTextModel(parsed))),
        dtype,
        (TensorSpec(io_spec.INPUT_IDS, "int64", (BATCH, length)),),
        (float_spec(io_spec.POOLED, BATCH, parsed.hidden_size),),
        strict=False,
    )


def t5_plan(config: Mapping[str, Any], dtype: torch.dtype) -> GraphPlan:
    """T5's encoder of a transformers config."""
    parsed = T5Config.from_dict(dict(config))
    return GraphPlan(
        TEXT_ENCODER_2,
        lambda: T5Graph(_with_eager_attention(T5EncoderModel(parsed))),
        dtype,
        (TensorSpec(io_spec.INPUT_IDS, "int64", (BATCH, TEXT)),),
        (float_spec(io_spec.TOKENS, BATCH, TEXT, parsed.d_model),),
        strict=False,
    )


def decoder_plan(cls: Any, config: Mapping[str, Any]) -> GraphPlan:
    """The decoder of an autoencoder, always fp32: its last feature maps exceed the range of half precision."""
    channels = int(config["latent_channels"])
    return GraphPlan(
        VAE_DECODER,
        lambda: DecoderGraph(cls.from_config(dict(config))),
        torch.float32,
        (float_spec(io_spec.LATENTS, BATCH, channels, HEIGHT, WIDTH),),
        (float_spec(io_spec.IMAGES, BATCH, 3, PIXEL_HEIGHT, PIXEL_WIDTH),),
        strict=False,
    )


def _with_eager_attention(encoder: Any) -> Any:
    # the fused attention of T5 does not export: its output's strides cannot be viewed with a dynamic length
    encoder.set_attn_implementation("eager")
    return encoder


def float_spec(name: str, *shape: int | str) -> TensorSpec:
    """An fp32 input or output."""
    kind: Literal["float32"] = "float32"
    return TensorSpec(name, kind, shape)
