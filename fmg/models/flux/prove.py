"""The proof of a saved adapter: stock diffusers reads it into a fresh transformer, which must draw the same picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CheckpointError
from fmg.models.flux.adapter import base_name, is_adapter
from fmg.models.flux.loading import FluxComponents

PROMPT = "a red circle left"
"""What proofs draw."""
TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType({torch.float32: 1e-4, torch.bfloat16: 0.05})
"""Largest difference of a pixel in [0, 1] between the trained model and the reloaded one, by the network's dtype.

Stock diffusers rounds an adapter to the dtype of the base, so a bf16 picture agrees to bf16's precision only.
"""


def fresh_transformer(transformer: Any) -> Any:
    """A transformer without adapter over the same base tensors: no weight is copied, so it costs nothing at any size."""
    with torch.device("meta"):
        fresh = type(transformer).from_config(transformer.config)
    tensors = {base_name(name): x for name, x in transformer.state_dict().items() if not is_adapter(name)}
    fresh.load_state_dict(tensors, assign=True)
    return fresh.eval().requires_grad_(False)


def reloaded(components: FluxComponents, folder: Path) -> FluxComponents:
    """The components with a fresh transformer into which `FluxPipeline.load_lora_weights` has read `folder`."""
    transformer = fresh_transformer(components.transformer)
    text = components.text
    pipeline = FluxPipeline(
        scheduler=None,
        vae=components.vae,
        text_encoder=text.text_encoder,
        tokenizer=text.tokenizer,
        text_encoder_2=text.text_encoder_2,
        tokenizer_2=text.tokenizer_2,
        transformer=transformer,
    )
    pipeline.load_lora_weights(str(folder))
    return replace(components, transformer=transformer)


def check_same(
    trained: Float[Tensor, "b 3 h w"], drawn: Float[Tensor, "b 3 h w"], dtype: torch.dtype, folder: Path
) -> float:
    """The largest difference of a pixel.

    Raises:
        CheckpointError: it is beyond the tolerance of `dtype`, or not a number.
    """
    difference = float((trained - drawn).abs().max())
    tolerance = TOLERANCE[dtype]
    if not difference <= tolerance:
        raise CheckpointError(
            f"The adapter saved as {folder.name} draws another picture when diffusers reads it back: pixels differ by"
            f" {difference:.2g}, more than {tolerance:g}; it was not kept",
            "Check the disk, and the versions of diffusers and peft.",
        )
    return difference


def picture_noise(shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "1 c h w"]:
    """The noise that proofs start from."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
