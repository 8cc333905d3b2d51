"""The graphs of any family, by its own code: from tokens to conditioning, from latents to velocities and to images.

What is traced is built from the configs of a loaded model, with one size of latents and one length of prompts. FLUX,
whose graphs have several sizes, has its own (`fmg.export.graphs`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fmg.core.errors import UsageError
from fmg.core.types import Conditioning
from fmg.export.graphs import GraphModule, GraphPlan, float_spec
from fmg.inference.artifact import io_spec
from fmg.inference.artifact.manifest import BATCH, TEXT_ENCODERS, TRANSFORMER, VAE_DECODER, TensorSpec
from fmg.models.common.adapter import base_name, is_adapter
from fmg.models.common.model import AdaptedModel
from fmg.models.common.network import LatentNetwork
from fmg.models.common.text import TokenisedText

_OWN_INPUTS = frozenset({io_spec.LATENTS, io_spec.TIMESTEP, io_spec.SECOND, io_spec.GUIDANCE})


class TracedConditioning(Conditioning):
    """Conditioning inside a graph: the number of prompts is a dynamic axis, so the prompts cannot be listed."""

    def __post_init__(self) -> None:
        """Compares no number of rows."""


class NetworkGraph(GraphModule):
    """The network of any family from latents to velocities, by the family's own code.

    Args:
        inner: the transformer.
        network_class: how the family calls it.
        dtype: of its weights.
    """

    def __init__(self, inner: Any, network_class: type[LatentNetwork], dtype: torch.dtype) -> None:
        super().__init__(inner)
        self._network = partial(network_class, inner, dtype)

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The conditioning is one mapping."""
        alone = {name: x for name, x in values.items() if name in _OWN_INPUTS}
        return {**alone, "conditioning": {name: x for name, x in values.items() if name not in _OWN_INPUTS}}

    def forward(
        self,
        latents: Float[Tensor, "b c h w"],
        timestep: Float[Tensor, " b"],
        second: Float[Tensor, " b"] | None = None,
        guidance: Float[Tensor, " b"] | None = None,
        *,
        conditioning: Mapping[str, Tensor],
    ) -> Float[Tensor, "b c h w"]:
        """The (average) velocity at `timestep` towards `second`, fp32."""
        for rows in (timestep, *conditioning.values()):
            # told to the tracer, which would otherwise find out too late for the reshapes of attention
            torch._check(rows.shape[0] == latents.shape[0])  # type: ignore[no-untyped-call]
        cond, network = TracedConditioning((), dict(conditioning)), self._network(guidance)
        if second is None:
            return network.single_time(latents, timestep, cond)
        return network.two_time(latents, timestep, second, cond)


class TextGraph(GraphModule):
    """All text encoders of a family, from the tokens of prompts to what conditions the network.

    Args:
        inner: the encoders by name, as a `ModuleDict`.
        stack: the family's code, with the encoders of `inner`.
    """

    def __init__(self, inner: nn.ModuleDict, stack: TokenisedText) -> None:
        super().__init__(inner)
        self._stack = stack

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """All inputs are one mapping."""
        return {"tokens": dict(values)}

    def forward(self, *, tokens: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The tensors of `Conditioning` in their order; floating-point ones in fp32."""
        first, *others = tokens.values()
        for rows in others:
            torch._check(rows.shape[0] == first.shape[0])  # type: ignore[no-untyped-call]
        states = self._stack.states(tokens).values()
        return tuple(x.float() if x.is_floating_point() else x.long() for x in states)


class LatentDecoder(GraphModule):
    """The autoencoder's decoder as a family calls it.

    Args:
        inner: the autoencoder.
        vae_latents: transforms latents as the family does before decoding.
    """

    def __init__(self, inner: Any, vae_latents: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(inner)
        self._vae_latents = vae_latents

    def forward(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Images in [0, 1]."""
        images: Tensor = self.inner.decode(self._vae_latents(self.inner, latents), return_dict=False)[0]
        return ((images.float() + 1) / 2).clamp(0, 1)


def network_plan(model: AdaptedModel[Any], dtype: torch.dtype | None = None) -> GraphPlan:
    """The network without its adapter, in a dtype or (None) in its own."""
    network: Any = model.network
    config, conventions, traced = dict(network.config), model.components.conventions, dtype or network.dtype
    latents: tuple[int | str, ...] = (BATCH, *model.latent_shape)
    conditioning = _example(model)
    inputs = [float_spec(io_spec.LATENTS, *latents), float_spec(io_spec.TIMESTEP, BATCH)]
    inputs += [float_spec(io_spec.SECOND, BATCH)] if conventions.map == "two-time" else []
    inputs += [] if model.guidance_of(model.components) is None else [float_spec(io_spec.GUIDANCE, BATCH)]
    cls = type(network)

    def build() -> GraphModule:
        return NetworkGraph(_with_tables(cls.from_config(config), network), model.network_class, traced)

    return GraphPlan(
        TRANSFORMER,
        build,
        traced,
        (*inputs, *conditioning),
        (float_spec(io_spec.VELOCITY, *latents),),
        # a class may have weights for inputs that the family does not give, such as images
        strict=False,
    )


def text_plan(model: AdaptedModel[Any]) -> GraphPlan:
    """The text encoders in fp32, for the model's length of prompts.

    Raises:
        UsageError: the family encodes prompts in one piece.
    """
    stack = text_stack(model)
    tokens = stack.tokenise([""], model.components.conventions.max_sequence_length)
    inputs = tuple(_spec(name, x) for name, x in tokens.items())

    def build() -> GraphModule:
        built = {name: _with_tables(_fresh(encoder), encoder) for name, encoder in encoders(stack).items()}
        return TextGraph(nn.ModuleDict(built), replace(stack, **built))  # type: ignore[type-var]

    return GraphPlan(TEXT_ENCODERS, build, torch.float32, inputs, _example(model), strict=False)


def decoder_plan(model: AdaptedModel[Any]) -> GraphPlan:
    """The decoder, always in fp32."""
    vae, side = model.components.vae, model.spec.resolution
    cls, config = type(vae), dict(vae.config)
    return GraphPlan(
        VAE_DECODER,
        lambda: LatentDecoder(_with_tables(cls.from_config(config), vae), model.vae_latents),
        torch.float32,
        (float_spec(io_spec.LATENTS, BATCH, *model.latent_shape),),
        (float_spec(io_spec.IMAGES, BATCH, 3, side, side),),
        strict=False,
    )


def reference(model: AdaptedModel[Any], graph: str) -> GraphModule:
    """The torch module of a graph over the live components of a model."""
    if graph == TEXT_ENCODERS:
        stack = text_stack(model)
        return TextGraph(nn.ModuleDict(encoders(stack)), stack)
    if graph == VAE_DECODER:
        return LatentDecoder(model.components.vae, model.vae_latents)
    network: Any = model.network
    return NetworkGraph(network, model.network_class, network.dtype)


def text_stack(model: AdaptedModel[Any]) -> TokenisedText:
    """The text encoders of a model.

    Raises:
        UsageError: the family encodes prompts in one piece.
    """
    stack = model.components.text
    if not isinstance(stack, TokenisedText):
        raise UsageError(
            f"The text encoders of {model.components.folder} cannot be traced: they encode a prompt in one piece",
            "Let its text stack inherit from fmg.models.common.text.TokenisedText.",
        )
    return stack


def encoders(stack: TokenisedText) -> dict[str, nn.Module]:
    """The encoder modules by their names in the stack."""
    values = {entry.name: getattr(stack, entry.name) for entry in fields(stack)}  # type: ignore[arg-type]
    return {name: value for name, value in values.items() if isinstance(value, nn.Module)}


def _example(model: AdaptedModel[Any]) -> tuple[TensorSpec, ...]:
    """What conditions the network, by name, in the order of the text stack: embeddings from a file have another."""
    with model.text_uncached():
        return tuple(_spec(name, x) for name, x in model.encode([""]).stored.items())


def _spec(name: str, x: Tensor) -> TensorSpec:
    return TensorSpec(name, "float32" if x.is_floating_point() else "int64", (BATCH, *x.shape[1:]))


def _fresh(encoder: Any) -> nn.Module:
    config = copy.deepcopy(encoder.config)
    # fused attention does not export with a dynamic number of rows
    config._attn_implementation = "eager"
    built: nn.Module = type(encoder)(config)
    return built


def _with_tables(built: nn.Module, loaded: nn.Module) -> nn.Module:
    """Gives a module that was built without memory the buffers that no file has, such as frequencies of positions."""
    stored = {base_name(name) for name in loaded.state_dict() if not is_adapter(name)}
    for name, buffer in loaded.named_buffers():
        if name not in stored:
            place, _, last = name.rpartition(".")
            # as it is: an operation would make it a tensor without values, where the module is built
            built.get_submodule(place)._buffers[last] = buffer
    return built


def plans(model: AdaptedModel[Any], dtype: torch.dtype) -> Sequence[GraphPlan]:
    """All graphs of an artifact: the network in a dtype, everything else in fp32."""
    return text_plan(model), network_plan(model, dtype), decoder_plan(model)
