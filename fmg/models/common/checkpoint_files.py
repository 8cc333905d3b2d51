"""Names of the files of a checkpoint; `saved_weights` writes and reads them. Imports no torch.

An adapter:

<folder>/pytorch_lora_weights.safetensors   `pipe.load_lora_weights(folder)`; ComfyUI
<folder>/peft/adapter_config.json, adapter_model.safetensors   `PeftModel.from_pretrained(transformer, folder/peft)`
<folder>/fmg_adapter.json   base, map kind and time convention, which neither format can state
<folder>/fmg_extra.safetensors   base weights that were trained, such as the second-time embedder

A fully tuned transformer, as a component folder of diffusers:

<folder>/transformer/config.json, diffusion_pytorch_model*.safetensors   `from_pretrained(folder/transformer)`
<folder>/fmg_transformer.json   base, map kind and time convention
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from fmg.core.files import digest

ADAPTER_MANIFEST = "fmg_adapter.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FOLDER = "peft"
PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_FILE = "adapter_model.safetensors"
EXTRA_FILE = "fmg_extra.safetensors"
TRANSFORMER_MANIFEST = "fmg_transformer.json"
COMPONENT = "transformer"
CARD = "README.md"
SAMPLES = "samples.png"
KOHYA_FILE = "kohya_lora.safetensors"
"""The LoRA in kohya's layout, at the default location of `fmg export`: in the run folder."""
KOHYA_DIGEST = "fmg_adapter_digest"
"""Metadata key in that file with the digest (`adapter_digest`) of the adapter that it was made from."""

READ = (
    ADAPTER_MANIFEST,
    DIFFUSERS_FILE,
    EXTRA_FILE,
    TRANSFORMER_MANIFEST,
    f"{COMPONENT}/config.json",
    f"{COMPONENT}/diffusion_pytorch_model.safetensors",
    f"{COMPONENT}/diffusion_pytorch_model.safetensors.index.json",
    f"{COMPONENT}/diffusion_pytorch_model-?????-of-?????.safetensors",
)
"""Patterns of the checkpoint files that fmg reads."""
WRITTEN = (*READ, f"{PEFT_FOLDER}/{PEFT_CONFIG_FILE}", f"{PEFT_FOLDER}/{PEFT_FILE}")
"""Patterns of all checkpoint files that hold trained weights."""


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that match one of the patterns, in their order."""
    patterns = tuple(patterns)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds an adapter or a fully tuned transformer."""
    return any((folder / name).is_file() for name in (ADAPTER_MANIFEST, TRANSFORMER_MANIFEST))


def is_full(folder: Path) -> bool:
    """Whether a checkpoint is a fully tuned transformer."""
    return (folder / TRANSFORMER_MANIFEST).is_file()


def adapter_digest(folder: Path) -> str:
    """Sha256 over the weight files of an adapter, each under its name."""
    files = [folder / name for name in (DIFFUSERS_FILE, EXTRA_FILE) if (folder / name).is_file()]
    text = "".join(f"{digest(file)} {file.name}\n" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()
