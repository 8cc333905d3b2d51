"""The SANA transformer as the plain function of latents, time and conditioning that a flow map takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.types import Conditioning


class SanaNetwork:
    """`net(z, s, cond)`: the velocity in rectified-flow coordinates, on latents (b, c, h, w).

    Latents enter in the transformer's dtype and leave in fp32; time and guidance stay fp32 to their sinusoids. The
    transformer is called as a module, so that the hooks of DDP, FSDP2 and PEFT fire.

    Args:
        transformer: a `SanaTransformer2DModel` with an embedded guidance scale, or a wrapper with its call signature.
        dtype: dtype of the latents that the transformer takes.
        guidance: guidance scale, already multiplied by the `guidance_embeds_scale` of the weights.
        scope: context that every call of the transformer runs in.
    """

    def __init__(
        self,
        transformer: Callable[..., Any],
        dtype: torch.dtype,
        guidance: float,
        scope: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._transformer = transformer
        self._dtype = dtype
        self._guidance = guidance
        self._scope = scope

    def within(
        self, scope: Callable[[], AbstractContextManager[None]], transformer: Callable[..., Any] | None = None
    ) -> SanaNetwork:
        """The same network, every call of which runs in another context, and through `transformer` if given."""
        return SanaNetwork(transformer or self._transformer, self._dtype, self._guidance, scope)

    def __call__(
        self, z: Float[Tensor, "b c h w"], time: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """The velocity at the rectified-flow time `time` in [0, 1]."""
        time = time.float()
        with self._scope():
            output: Tensor = self._transformer(
                hidden_states=z.to(self._dtype),
                encoder_hidden_states=cond.tensors["tokens"].to(self._dtype),
                encoder_attention_mask=cond.tensors["mask"],
                timestep=time,
                guidance=torch.full_like(time, self._guidance),
                return_dict=False,
            )[0]
        return output.float()
