"""Sizes of a pipeline folder of any family, from its JSON files and safetensors headers. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fmg.core.errors import CheckpointError, reason
from fmg.core.json_io import read_safetensors_header
from fmg.core.model_folder import RESTORE, absent_weights, weight_files, wholes

FLUX_VAE: Mapping[str, object] = MappingProxyType(
    {"_class_name": "AutoencoderKL", "latent_channels": 16, "block_out_channels": [128, 256, 512, 512]}
)
FLUX_DECODER = 83_819_683
"""Parameters of FLUX's autoencoder."""

_FLOATS = ("F64", "F32", "F16", "BF16")
# Feature maps at full resolution that are alive at once while the last blocks of an autoencoder run, measured.
_KL_WIDE, _KL_NARROW, _TINY = 3, 5, 2


def latent_scale(vae: Mapping[str, object]) -> int:
    """Image pixels along the side of one latent pixel."""
    return int(2 ** (len(_channels(vae)) - 1))


def decoder_values(vae: Mapping[str, object]) -> int:
    """Peak number of values that an `AutoencoderKL` or `AutoencoderTiny` keeps per pixel of the image."""
    channels = _channels(vae)
    if vae.get("_class_name") == "AutoencoderTiny":
        return _TINY * channels[0]
    return max(_KL_WIDE * channels[min(1, len(channels) - 1)], _KL_NARROW * channels[0])


def _channels(vae: Mapping[str, object]) -> list[int]:
    stated = wholes(vae, "block_out_channels") or wholes(vae, "decoder_block_out_channels")
    return stated or [128, 256, 512, 512]


def stored_parameters(folder: Path | None, *components: str) -> int:
    """Parameters in the safetensors files of some components, by their headers; 0 when one has no file.

    Raises:
        CheckpointError: a file is damaged.
    """
    if folder is None or any(absent_weights(folder / name) for name in components):
        return 0
    return sum(_parameters(file) for file in {file for name in components for file in weight_files(folder / name)})


def _parameters(file: Path) -> int:
    """Number of values in the tensors listed in a safetensors header."""
    try:
        header, _ = read_safetensors_header(file)
        entries: list[Any] = [entry for name, entry in header.items() if name != "__metadata__"]
        return sum(math.prod(map(int, entry["shape"])) for entry in entries if entry["dtype"] in _FLOATS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {reason(error)}", RESTORE) from None
