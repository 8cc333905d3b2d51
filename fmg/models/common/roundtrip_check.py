"""Verifies saved weights: stock diffusers loads them into a fresh transformer, which must generate the same image."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CheckpointError
from fmg.core.stdout_redirect import quiet
from fmg.models.common.adapter import ADAPTER, base_tensors

_FIX = "Check the disk, and the versions of diffusers and peft."
PROMPT = "a red circle left"
"""The prompt that verification generates an image of."""
TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType({torch.float32: 1e-5, torch.bfloat16: 1e-2})
"""Mean difference of the pixels in [0, 1] between the trained model and the reloaded one, by the network's dtype.

Stock diffusers rounds an adapter to the dtype of the base, so a bf16 image agrees to bf16's precision only.
"""


def fresh_transformer(transformer: Any, base: Mapping[str, Tensor] = MappingProxyType({})) -> Any:
    """A transformer without adapter over the same base tensors: no weight is copied, so it costs nothing at any size.

    `base` has the base values of base weights that were trained; they replace those in the transformer.
    """
    with torch.device("meta"):
        fresh = type(transformer).from_config(transformer.config)
    fresh.load_state_dict({**base_tensors(transformer), **base}, assign=True)
    return fresh.eval().requires_grad_(False)


def reloaded(transformer: Any, folder: Path, pipeline: Any, base: Mapping[str, Tensor] = MappingProxyType({})) -> Any:
    """A fresh transformer over the same base, into which the stock `pipeline` class has read `folder`."""
    others = dict.fromkeys(list(inspect.signature(pipeline).parameters))
    stock = pipeline(**{**others, "transformer": fresh_transformer(transformer, base)})
    # diffusers warns that the file has no weights for the text encoders
    with quiet(diffusers_logging), warnings.catch_warnings():
        # PEFT only suspects a problem; comparing the tensors decides
        warnings.simplefilter("ignore", RuntimeWarning)
        stock.load_lora_weights(str(folder), adapter_name=ADAPTER)
    return stock.transformer


def component(transformer: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The transformer that stock diffusers reads from a saved component folder, on the device of `transformer`."""
    with quiet(diffusers_logging):
        stock = type(transformer).from_pretrained(
            str(folder), torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
    return stock.to(transformer.device).eval().requires_grad_(False)


def check_tensors(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], folder: Path) -> None:
    """Checks that the tensors read back are the saved ones, bit for bit after rounding to their own dtype.

    Raises:
        CheckpointError: one is missing, unexpected or different.
    """
    wrong = sorted(wanted.keys() ^ given.keys()) or [
        name for name, x in given.items() if not torch.equal(x.detach(), wanted[name].detach().to(x.dtype))
    ]
    if wrong:
        raise CheckpointError(
            f"The weights saved as {folder.name} are different after diffusers loads them: {wrong[0]}"
            f" (one of {len(wrong)}); they were not kept",
            _FIX,
        )


def check_same(
    trained: Float[Tensor, "b 3 h w"], drawn: Float[Tensor, "b 3 h w"], dtype: torch.dtype, folder: Path
) -> float:
    """The mean difference of the pixels.

    Raises:
        CheckpointError: it exceeds the tolerance of `dtype`, or is not a number.
    """
    difference = float((trained - drawn).abs().mean())
    tolerance = TOLERANCE[dtype]
    if not difference <= tolerance:
        raise CheckpointError(
            f"The weights saved as {folder.name} generate a different image after diffusers loads them: pixels differ"
            f" by {difference:.2g} on average, more than {tolerance:g}; they were not kept",
            _FIX,
        )
    return difference


def image_noise(shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "1 c h w"]:
    """The noise that verification starts from."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
