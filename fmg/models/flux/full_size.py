"""Loads a FLUX-class model of full size by its config."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fmg.core.errors import FmgWarning, MissingDependencyError
from fmg.models.common.text import cached_encoders
from fmg.models.flux.loading import load_parts
from fmg.models.flux.model import FluxModel
from fmg.models.flux.probe import time_scale_doubt
from fmg.models.flux_configs import FluxConfig, FluxStudentConfig
from fmg.models.sources import locate

ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def load(name: str, config: FluxConfig, device: torch.device, dtype: torch.dtype) -> FluxModel:
    """The model that `config` describes, from files on this computer.

    Raises:
        MissingDependencyError: files that have not been fetched, or an attention backend that is not installed.
        CheckpointError: a file that is damaged, of another kind, or does not fit the others.
    """
    student = locate(config.parts()[0], name) if isinstance(config, FluxStudentConfig) else None
    components = load_parts(
        locate(config.architecture(), name),
        config.conventions(),
        device,
        dtype,
        student=student,
        text_device=device if config.text_device == "model" else torch.device("cpu"),
    )
    transformer = components.transformer
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    _set_attention(transformer, config.attention)
    doubt = time_scale_doubt(transformer.time_text_embed.timestep_embedder, config.time_scale)
    if doubt is not None:
        warnings.warn(f"'{name}': {doubt}", FmgWarning, stacklevel=2)
    text = cached_encoders(
        components.text,
        components.folder,
        ENCODER_FOLDERS,
        config.max_sequence_length,
        device,
        place=config.text_device,
        cache=config.text_cache,
    )
    return FluxModel(components, name, text=text)


def _set_attention(transformer: Any, backend: str) -> None:
    if backend == "native":
        return
    try:
        transformer.set_attention_backend(backend)
    except (RuntimeError, ImportError, ValueError) as error:
        raise MissingDependencyError(
            f"The attention backend '{backend}' cannot be used: {' '.join(str(error).split())[:200]}",
            "Install what it needs, or set model.attention to native.",
        ) from error
