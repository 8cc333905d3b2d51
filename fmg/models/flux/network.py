"""The transformer as the plain function of latents, times and conditioning that the flow-map adapters take."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.types import Conditioning
from fmg.models.flux.latents import image_ids, pack, unpack


class FluxNetwork:
    """`u(x, t, s, cond)` or `net(x, t, cond)` on unpacked latents (b, c, h, w).

    Latents enter in the transformer's dtype and leave in fp32; times stay fp32 to the embedding. The transformer is
    called as a module, so that the hooks of DDP, FSDP2 and PEFT fire.

    Args:
        transformer: a `FlowMapFluxTransformer2DModel`, or a wrapper with its call signature.
        dtype: dtype of the latents that the transformer takes.
        guidance: guidance scale for weights that embed one, else None.
        scope: context that every call of the transformer runs in.
    """

    def __init__(
        self,
        transformer: Callable[..., Any],
        dtype: torch.dtype,
        guidance: float | None,
        scope: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._transformer = transformer
        self._dtype = dtype
        self._guidance = guidance
        self._scope = scope
        self._ids: dict[tuple[int, int, torch.device], Tensor] = {}

    def within(
        self, scope: Callable[[], AbstractContextManager[None]], transformer: Callable[..., Any] | None = None
    ) -> FluxNetwork:
        """The same network, every call of which runs in another context, and through `transformer` if given."""
        return FluxNetwork(transformer or self._transformer, self._dtype, self._guidance, scope)

    def two_time(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Average velocity from `t` to `s`; the velocity for `s = t`."""
        return self._call(x, t, s, cond)

    def single_time(
        self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Average velocity from `t` to 0."""
        return self._call(x, t, None, cond)

    def _call(self, x: Tensor, t: Tensor, s: Tensor | None, cond: Conditioning) -> Tensor:
        height, width = x.shape[-2:]
        tokens, pooled = cond.tensors["tokens"], cond.tensors["pooled"]
        guidance = None if self._guidance is None else torch.full_like(t, self._guidance, dtype=torch.float32)
        with self._scope():
            output: Tensor = self._transformer(
                hidden_states=pack(x).to(self._dtype),
                encoder_hidden_states=tokens.to(self._dtype),
                pooled_projections=pooled,
                timestep=t.float(),
                second=None if s is None else s.float(),
                guidance=guidance,
                img_ids=self._image_ids(height, width, x.device),
                txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device),
                return_dict=False,
            )[0]
        return unpack(output, height, width).float()

    def _image_ids(self, height: int, width: int, device: torch.device) -> Tensor:
        key = (height, width, device)
        if key not in self._ids:
            self._ids[key] = image_ids(height, width, device)
        return self._ids[key]
