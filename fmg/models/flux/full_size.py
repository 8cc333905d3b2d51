"""Loads a FLUX-class model of full size by its config."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fmg.core.errors import FmgWarning, MissingDependencyError
from fmg.models.common.text import TextEncoders
from fmg.models.flux.family import FluxModel
from fmg.models.flux.loading import FluxComponents, load_parts
from fmg.models.flux.probe import time_scale_doubt
from fmg.models.flux_configs import FluxConfig, FluxStudentConfig
from fmg.models.sources import locate
from fmg.models.text_cache import TextCache, encoder_key

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
    return FluxModel(components, name, text=_text_encoders(components, config, device))


def _text_encoders(components: FluxComponents, config: FluxConfig, device: torch.device) -> TextEncoders:
    encoder, length = components.text.text_encoder_2, config.max_sequence_length
    computes_on = encoder.device if config.text_device == "cpu" else device
    disk = None
    if config.text_cache:
        disk = TextCache(encoder_key(components.folder, ENCODER_FOLDERS, length, encoder.dtype, computes_on))
    # one prompt a call, so that an embedding does not depend on what else was missing when it was made
    return TextEncoders(
        components.text, length, device, batch_size=1, offload=config.text_device == "offload", disk=disk
    )


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
