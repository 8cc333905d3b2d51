"""Parameters of a FLUX-class transformer from its `config.json`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fmg.core.model_folder import whole

FLUX_LITE: Mapping[str, object] = MappingProxyType(
    {
        "in_channels": 64,
        "num_layers": 8,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    }
)
"""The transformer of FLUX.1-lite-8B, for plans that are made before its files are there."""

FLUX_SCHNELL: Mapping[str, object] = MappingProxyType({**FLUX_LITE, "num_layers": 19, "guidance_embeds": False})
"""The transformer of FLUX.1 [schnell]."""

_SINUSOID_CHANNELS = 256


def transformer_parameters(config: Mapping[str, object], *, second_time: bool) -> int:
    """Number of parameters of a `FlowMapFluxTransformer2DModel` with this config.

    Args:
        config: as in `transformer/config.json` of a diffusers folder; what it leaves out is taken from FLUX.1-lite.
        second_time: whether there is an embedder of the second time.
    """

    known = {**FLUX_LITE, **config}

    def size(key: str, least: int = 1) -> int:
        return whole(known, key, least)

    head = size("attention_head_dim")
    inner = size("num_attention_heads") * head
    channels = size("in_channels")
    out = size("out_channels") if config.get("out_channels") else channels
    guided = bool(known["guidance_embeds"])

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    square, feed_forward = linear(inner, inner), linear(inner, 4 * inner) + linear(4 * inner, inner)
    time = linear(_SINUSOID_CHANNELS, inner) + square
    embedders = (1 + guided + second_time) * time + linear(size("pooled_projection_dim"), inner) + square
    embedders += linear(channels, inner) + linear(size("joint_attention_dim"), inner)
    double = 2 * linear(inner, 6 * inner) + 8 * square + 4 * head + 2 * feed_forward
    single = linear(inner, 3 * inner) + linear(inner, 4 * inner) + linear(5 * inner, inner) + 3 * square + 2 * head
    last = linear(inner, 2 * inner) + linear(inner, out)
    return embedders + size("num_layers", 0) * double + size("num_single_layers", 0) * single + last
