"""Loads SANA-Sprint by its config."""

from __future__ import annotations

import torch

from fmg.models.common.text import cached_encoders
from fmg.models.sana.encoders import published_instruction
from fmg.models.sana.loading import load_parts
from fmg.models.sana.model import SanaModel
from fmg.models.sana_configs import SanaSprintConfig
from fmg.models.sources import locate

ENCODER_FOLDERS = ("text_encoder", "tokenizer")


def load(name: str, config: SanaSprintConfig, device: torch.device, dtype: torch.dtype) -> SanaModel:
    """The model that `config` describes, from files on this computer.

    Raises:
        MissingDependencyError: files that have not been fetched.
        CheckpointError: a file that is damaged, of another kind, or does not fit the others.
    """
    instruction = published_instruction() if config.instruction else ""
    components = load_parts(
        locate(config.architecture(), name),
        config.conventions(),
        device,
        dtype,
        instruction=instruction,
        text_device=device if config.text_device == "model" else torch.device("cpu"),
    )
    if config.gradient_checkpointing:
        components.transformer.enable_gradient_checkpointing()
    text = cached_encoders(
        components.text,
        components.folder,
        ENCODER_FOLDERS,
        config.max_sequence_length,
        device,
        place=config.text_device,
        cache=config.text_cache,
        facts=(instruction,),
    )
    return SanaModel(components, name, text=text)
